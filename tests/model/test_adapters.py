"""Adapters: batch norms of other libraries' classes are recognized, converted with what they run after, or named."""

import copy
import pickle

import pytest
import torch
from lookalikes import BatchNormAct2d, FrozenBatchNorm2d
from torch import nn

import batchnorm as bn
from batchnorm.model.find import find

ACTIVATIONS = [nn.ReLU(inplace=True), nn.SiLU(), nn.Hardswish(), nn.Identity(), nn.Mish(), nn.PReLU(3)]
DROPS = [None, nn.Identity(), nn.Dropout2d(0.5)]


def step(layer, x):
    """Output, gradients and buffers of one training step."""
    torch.manual_seed(0)  # of the dropout
    x = x.clone().requires_grad_()
    y = layer(x)
    gradients = torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])
    return [y, *gradients, *layer.buffers()]


@pytest.mark.parametrize("drop", DROPS, ids=str)
@pytest.mark.parametrize("act", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("mode", [True, False])
def test_a_norm_with_activation_computes_the_same_and_keeps_its_children(act, drop, mode):
    layer = BatchNormAct2d(3, copy.deepcopy(act), drop).train(mode)
    exact, converted = copy.deepcopy(layer).double(), bn.convert(copy.deepcopy(layer))
    assert isinstance(converted, BatchNormAct2d)
    assert repr(converted.act) == repr(layer.act)
    x = torch.randn(4, 3, 5, 5) * 3 + 1
    theirs = step(layer, x)
    for ours, torchs, true in zip(step(converted, x), theirs, step(exact, x.double()), strict=True):
        # Ours rounds once where torch rounds twice; sums over 100 values of up to 20 carry some 1e-6 of each.
        bound = 2 * (torchs.double() - true).abs().max() + 1e-5 * true.abs().max()
        assert (ours.double() - true).abs().max() <= bound
    assert converted.state_dict().keys() == layer.state_dict().keys()


@pytest.mark.parametrize(
    ("act", "drop", "fused"),
    [(nn.ReLU(), None, True), (nn.Mish(), None, False), (nn.ReLU(), nn.Dropout(), False)],
    ids=str,
)
def test_the_activation_is_fused_where_nothing_stands_between(act, drop, fused):
    layer, ran = bn.convert(BatchNormAct2d(3, act, drop)), []
    layer.act.forward = lambda x: ran.append(x) or x  # nobody calls a fused one; this one is seen, and so obeyed
    layer(torch.randn(2, 3, 4, 4))
    assert len(ran) == 1
    del layer.act.forward
    y = layer(torch.randn(2, 3, 4, 4))
    names = {type(node).__name__ for node in graph(y.grad_fn)}
    assert any("Relu" in name or "Mish" in name for name in names) is not fused


def graph(node):
    yield node
    for below, _ in node.next_functions:
        if below is not None:
            yield from graph(below)


def test_a_hook_on_the_activation_is_called():
    layer, seen = bn.convert(BatchNormAct2d(3)), []
    layer.act.register_forward_hook(lambda module, args, out: seen.append(out.min().item()))
    layer(torch.randn(2, 3, 4, 4))
    assert seen == [0.0]


@pytest.mark.slow
def test_it_pickles_copies_compiles_and_reverts():
    layer, x = bn.convert(BatchNormAct2d(3), nonfinite="skip"), torch.randn(4, 3, 5, 5)
    layer(x)
    assert type(copy.deepcopy(layer)) is type(layer)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))
    assert bn.revert(layer) is layer
    assert type(layer) is BatchNormAct2d
    # Lightning, once imported, has torch.compile leave a mark of its own.
    assert vars(layer).keys() - {"_is_torch_compile", "_compile_kwargs"} == vars(BatchNormAct2d(3)).keys()


def test_options_and_sync_reach_it():
    layer = bn.convert(BatchNormAct2d(3), nonfinite="skip", sync=True)
    layer(torch.full((2, 3, 4, 4), torch.nan))
    assert (layer.running_mean == 0).all()
    assert layer.skipped == 1
    assert layer.beyond_torch == {"sync": True, "nonfinite": "skip"}


def test_a_subclass_that_overrides_its_forward_is_another_class():
    class Mine(BatchNormAct2d):
        def forward(self, x):
            return super().forward(x) + 1

    Mine.__module__ = "mine"
    with pytest.warns(UserWarning, match="1 Mine .*: overrides forward without calling super"):
        bn.convert(nn.Sequential(Mine(3)))


def test_a_frozen_lookalike_is_found_and_named():
    model = nn.Sequential(nn.BatchNorm2d(3), FrozenBatchNorm2d(3))
    assert [(found.name, found.kind, found.adapter.learns) for found in find(model)] == [
        ("0", "BatchNorm2d", True),
        ("1", "FrozenBatchNorm2d", False),
    ]
    with pytest.warns(UserWarning, match=r"(?s)converted 1 of 2.*1 FrozenBatchNorm2d \(1\): frozen: four buffers"):
        bn.convert(model)


@pytest.mark.parametrize(
    "like", [nn.LayerNorm(3), nn.InstanceNorm2d(3, affine=True, track_running_stats=True)], ids=str
)
def test_other_normalizations_are_no_batch_norms(like):
    assert find(nn.Sequential(like)) == []


def test_group_norm_goes_on_with_the_activation():
    layer, x = BatchNormAct2d(16, nn.ReLU(), nn.Dropout(0.0)), torch.randn(2, 16, 4, 4)
    weight = layer.weight
    bn.convert_to(bn.convert(layer), "group")
    assert layer.weight is weight
    torch.testing.assert_close(layer(x), torch.relu(nn.functional.group_norm(x, 2, weight, layer.bias)))
    torch.testing.assert_close(pickle.loads(pickle.dumps(layer))(x), layer(x))
