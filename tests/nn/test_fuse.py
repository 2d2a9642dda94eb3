"""convert(fuse=True): the same numbers, the same modules and keys, and a reason where it cannot be done."""

import copy
import pickle
import warnings

import pytest
import torch
from cases import make
from compare import assert_close
from models import Functional, small_mobilenet, small_resnet
from networks import BasicBlock
from torch import nn

import batchnorm as bn
from batchnorm.nn.fuse import _Fused

MODELS = {
    # model, input shape, activations fused
    "resnet": (small_resnet, (4, 3, 12, 12), 5),
    "mobilenet": (small_mobilenet, (4, 3, 16, 16), 6),
    "functional": (Functional, (8, 6), 4),
    "sequential": (lambda: nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.GELU("tanh")), (8, 6), 1),
}


def fused_calls(model):
    """How many batch-norm calls of the model's forward passes carry an activation."""
    count = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for module in model.modules():
            if isinstance(module, bn.nn.batchnorm._BatchNorm):

                def hook(layer, args, kwargs):
                    nonlocal count
                    count += "activation" in kwargs

                module.register_forward_pre_hook(hook, with_kwargs=True)
    return lambda: count


@pytest.mark.parametrize(("build", "shape", "expected"), MODELS.values(), ids=MODELS)
def test_values_gradients_and_state_are_those_of_the_model_before(build, shape, expected):
    torchs = build()
    exact = copy.deepcopy(torchs).double()
    fused = bn.convert(copy.deepcopy(torchs), fuse=True)
    assert list(fused.state_dict()) == list(torchs.state_dict())
    assert [n for n, _ in fused.named_modules()] == [n for n, _ in torchs.named_modules()]
    calls = fused_calls(fused)
    for training in (True, False):
        x = make(shape)
        results = []
        for model in (torchs, fused, exact):
            model.train(training).zero_grad()
            t = x.to(next(model.parameters()).dtype, copy=True).requires_grad_()
            y = model(t)
            y.square().sum().backward()
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            results.append([y, t.grad, *gradients, *model.buffers()])
        for a, b, c in zip(*results, strict=True):
            if b.is_floating_point():
                # Gradients add up a term for each of up to 600 positions.
                assert_close(b, c, peer=a, ulps=600)
            else:
                assert torch.equal(a, b)
    assert calls() == 2 * expected


def test_blocks_keep_their_class_hooks_and_copies():
    model = bn.convert(small_resnet(), fuse=True)
    x = make((4, 3, 12, 12))
    block = model[3]
    assert isinstance(block, BasicBlock)
    assert type(block).__name__ == "BasicBlock"
    seen = []
    block.register_forward_hook(lambda *_: seen.append(1))
    model.eval()
    expected = model(x)
    assert seen == [1]
    block._forward_hooks.clear()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(other[3], _Fused)
        assert torch.equal(other(x), expected)


def test_revert_gives_the_model_back():
    model = small_resnet()
    classes = [type(m) for m in model.modules()]
    x = make((4, 3, 12, 12))
    state = copy.deepcopy(model.state_dict())
    expected = model(x)
    model.load_state_dict(state)
    bn.revert(bn.convert(model, fuse=True))
    assert [type(m) for m in model.modules()] == classes
    assert torch.equal(model(x), expected)


def test_converting_twice_changes_nothing_more():
    model = bn.convert(small_resnet(), fuse=True)
    classes = [type(m) for m in model.modules()]
    bn.convert(model, fuse=True)
    assert [type(m) for m in model.modules()] == classes


def test_a_fused_model_compiles_without_a_graph_break():
    model = bn.convert(nn.Sequential(small_resnet()[0:4]), fuse=True)
    x = make((4, 3, 12, 12))
    expected = copy.deepcopy(model)(x)
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(x), expected, rtol=1e-5, atol=1e-5)


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm1d(6)


class OnValues(Branches):
    def forward(self, x):
        return self.bn(x).relu() if x.sum() > 0 else x


class OnMode(Branches):
    def forward(self, x):
        x = self.bn(x).relu()
        return nn.functional.dropout(x, training=self.training)


class OnType(Branches):
    def forward(self, x):
        return self.bn(x if isinstance(x, torch.Tensor) else torch.cat(x)).relu()


class OnChance(Branches):
    def forward(self, x):
        return self.bn(x * torch.rand(())).relu()


class SetsState(Branches):
    def forward(self, x):
        self.last = x
        return self.bn(x).relu()


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (OnValues, "cannot be traced"),
        (OnMode, "depends on the mode"),
        (OnType, "depends on"),
        (OnChance, "sets self._tensor_constant0|depends on"),
        (SetsState, "sets self.last"),
    ],
)
def test_what_a_trace_would_lose_is_not_fused_and_says_why(build, reason):
    model = nn.Sequential(build(), nn.Sequential(nn.BatchNorm1d(6), nn.ReLU()))
    keys = list(model[0].__dict__)
    with pytest.warns(UserWarning, match=f"0: its forward.*({reason})"):
        bn.convert(model, fuse=True)
    assert type(model[0]) is build
    assert list(model[0].__dict__) == keys
    assert type(model[0].bn) is bn.BatchNorm1d
    assert isinstance(model[1], _Fused)
    model(make((8, 6)))


class ChangesItsInput(Branches):
    def forward(self, x):
        x = x * 1
        z = self.bn(x)
        x.add_(1)
        return z.relu() + x


class UsesTheSumTwice(Branches):
    def forward(self, x):
        z = self.bn(x) + x
        return z.relu() + z


class AddsIntoTheResidual(Branches):
    def forward(self, x):
        residual = x * 1
        total = residual
        total += self.bn(x)
        return total.relu() + residual


@pytest.mark.parametrize("build", [ChangesItsInput, UsesTheSumTwice, AddsIntoTheResidual])
def test_what_would_not_compute_the_same_is_left_as_it_was(build):
    model = build()
    x = make((8, 6))
    expected = copy.deepcopy(model)(x.clone())
    torch.testing.assert_close(bn.convert(model, fuse=True)(x.clone()), expected, rtol=1e-5, atol=1e-5)


def test_a_layer_or_activation_with_a_hook_is_not_fused():
    model = nn.Sequential(nn.BatchNorm1d(6), nn.ReLU(), nn.BatchNorm1d(6), nn.ReLU())
    seen = []
    model[0].register_forward_hook(lambda *_: seen.append("bn"))
    model[3].register_forward_hook(lambda *_: seen.append("relu"))
    bn.convert(model, fuse=True)(make((8, 6)))
    assert seen == ["bn", "relu"]
