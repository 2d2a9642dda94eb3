"""convert_to(): group normalization by its formula in float64, the same objects, and nothing lost without a word."""

import copy
import pickle

import pytest
import torch
from compare import assert_close
from leftovers import everything
from torch import nn

import batchnorm as bn

SHAPES = {1: (6, 16), 2: (4, 16, 3, 2), 3: (2, 16, 3, 2, 2)}
LAYERS = [
    *((cls, SHAPES[1]) for cls in (nn.BatchNorm1d, bn.BatchNorm1d)),
    *((cls, SHAPES[2]) for cls in (nn.BatchNorm2d, bn.BatchNorm2d, nn.SyncBatchNorm, bn.SyncBatchNorm)),
    *((cls, SHAPES[3]) for cls in (nn.BatchNorm3d, bn.BatchNorm3d)),
]


def learned(layer, shape):
    """gamma, beta and running statistics that are not the initial ones."""
    layer(torch.randn(shape) * 2 + 1)
    with torch.no_grad():
        for p in layer.parameters():
            p.uniform_(0.5, 1.5)
    return layer


def by_groups(layer, x, groups):
    """The definition, in float64."""
    x = x.double()
    grouped = x.reshape(len(x), groups, -1)
    mean, var = grouped.mean(2, keepdim=True), grouped.var(2, correction=0, keepdim=True)
    xhat = ((grouped - mean) / (var + layer.eps).sqrt()).reshape(x.shape)
    shape = [1, -1] + [1] * (x.dim() - 2)
    for parameter, combine in ((layer.weight, torch.mul), (layer.bias, torch.add)):
        if parameter is not None:
            xhat = combine(xhat, parameter.double().view(shape))
    return xhat


@pytest.mark.parametrize(("cls", "shape"), LAYERS)
@pytest.mark.parametrize(("to", "groups"), [("group", 2), ("layer", 1), ("instance", 16)])
def test_it_is_group_normalization_with_the_same_gamma_and_beta(cls, shape, to, groups):
    layer = learned(cls(16, eps=1e-3), shape)
    weight, bias, x = layer.weight, layer.bias, torch.randn(shape) * 3 + 2
    if to == "instance" and isinstance(layer, nn.BatchNorm1d):
        with pytest.raises(ValueError, match="gives nothing but beta"):
            bn.convert_to(layer, to)
        return
    assert bn.convert_to(layer, to) is layer
    assert type(layer) is nn.GroupNorm
    assert (layer.weight is weight, layer.bias is bias) == (True, True)
    for mode in (True, False):
        assert_close(layer.train(mode)(x), by_groups(layer, x, groups), ulps=32)
    twin = nn.GroupNorm(groups, 16, eps=1e-3)
    twin.load_state_dict(layer.state_dict())
    assert repr(twin) == repr(layer)
    assert vars(twin).keys() == vars(layer).keys()
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), twin(x))


@pytest.mark.parametrize(
    "layer",
    [
        nn.BatchNorm2d(16, affine=False),
        bn.BatchNorm2d(16, center=False),
        bn.BatchNorm2d(16, scale=False),
        nn.BatchNorm2d(16, track_running_stats=False),
        bn.BatchNorm2d(16, virtual_batch_size=2, nonfinite="skip", unbiased=False),
        bn.convert(nn.BatchNorm2d(16), sync=True),
        nn.BatchNorm2d(16, dtype=torch.float64),
    ],
)
def test_layers_without_one_or_the_other(layer):
    x = torch.randn(
        SHAPES[2], dtype=torch.float64 if layer.weight is not None and layer.weight.dtype == torch.float64 else None
    )
    layer(x)
    bn.convert_to(layer, "group", num_groups=4)
    assert_close(layer(x), by_groups(layer, x, 4), ulps=32)
    assert vars(layer).keys() == vars(nn.GroupNorm(1, 1)).keys()


@pytest.mark.parametrize(
    ("channels", "groups"), [(7, 1), (8, 1), (16, 2), (24, 3), (31, 1), (36, 4), (64, 8), (256, 32), (2048, 32)]
)
def test_as_many_groups_as_divide_the_channels_up_to_32_of_8_at_least(channels, groups):
    assert bn.convert_to(nn.BatchNorm1d(channels), "group").num_groups == groups


class Net(nn.Module):
    """One layer in two places, hooks, and a forward of its own."""

    def __init__(self):
        super().__init__()
        self.norm = bn.BatchNorm2d(16)
        self.body = nn.Sequential(nn.Conv2d(16, 16, 1), self.norm, nn.ReLU(), nn.BatchNorm2d(16))

    def forward(self, x):
        return self.body(self.norm(x)).relu() + x


def test_the_same_objects_stay_in_all_their_places_with_hooks_and_optimizer():
    model = Net()
    seen = []
    handle = model.norm.register_forward_hook(lambda layer, args, y: seen.append(type(layer)))
    model.norm.bias.requires_grad_(False)
    model.norm.mine = 5
    model.norm.register_buffer("kept", torch.ones(2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = [(n, id(m)) for n, m in model.named_modules()], [(n, id(p)) for n, p in model.named_parameters()]
    assert bn.convert_to(model.train(), "group") is model
    assert ([(n, id(m)) for n, m in model.named_modules()], [(n, id(p)) for n, p in model.named_parameters()]) == before
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    assert (model.norm.mine, model.norm.bias.requires_grad, model.norm.training) == (5, False, True)
    assert [n for n, _ in model.named_buffers()] == ["norm.kept"]
    x = torch.randn(SHAPES[2])
    start = copy.deepcopy(model.state_dict())
    model(x).square().mean().backward()
    optimizer.step()
    assert seen == [nn.GroupNorm] * 2
    handle.remove()
    model(x)
    assert len(seen) == 2
    assert not torch.equal(model.norm.weight, start["norm.weight"])
    assert torch.equal(model(x)[:1], model(x[:1]))  # of the rest of the batch nothing matters


def test_a_fused_model_runs_its_activations_still():
    plain = nn.Sequential(nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16), nn.ReLU())
    fused = bn.convert(copy.deepcopy(plain), fuse=True)
    x = torch.randn(SHAPES[2])
    fused(x)
    assert torch.equal(bn.convert_to(fused, "layer")(x), bn.convert_to(plain, "layer")(x))


def test_frozen_is_freeze():
    model, expected = Net(), Net()
    bn.convert_to(model, "frozen")
    assert repr(model) == repr(bn.freeze(expected, stats=True, affine=True))
    assert "frozen=stats+affine" in repr(model)


class Mine(nn.BatchNorm2d):
    """A subclass that computes something else."""


@pytest.mark.parametrize(
    ("other", "options", "said"),
    [
        (Mine(16), {"to": "group"}, "cannot convert 1: Mine is a subclass"),
        (bn.BatchNorm2d(16, activation="relu"), {"to": "layer"}, "fused activation"),
        (bn.BatchNorm1d(16, channel_dim=-1), {"to": "group"}, "in dimension -1"),
        (bn.freeze(nn.BatchNorm2d(16)), {"to": "instance"}, "is frozen"),
        (nn.LazyBatchNorm2d(), {"to": "group"}, "not seen an input"),
        (nn.LazyBatchNorm2d(affine=False, track_running_stats=False), {"to": "group"}, "not seen an input"),
        (nn.BatchNorm2d(10), {"to": "group", "num_groups": 4}, "does not divide the 10 channels of 1"),
        (nn.BatchNorm2d(8), {"to": "group", "num_groups": -4}, "does not divide"),
        (nn.BatchNorm2d(8), {"to": "layer", "num_groups": 4}, "num_groups is for"),
        (nn.BatchNorm2d(8), {"to": "weight"}, "but got 'weight'"),
    ],
)
def test_what_would_be_lost_is_refused_and_nothing_has_changed(other, options, said):
    model = nn.Sequential(nn.BatchNorm2d(16), other)
    before = everything(model[0]), type(other), sorted(vars(other))
    with pytest.raises(ValueError, match=said):
        bn.convert_to(model, **options)
    assert (everything(model[0]), type(other), sorted(vars(other))) == before


def test_inside_a_block_it_is_refused():
    layer = nn.BatchNorm2d(16)
    with bn.accumulate(layer), pytest.raises(ValueError, match="end that block first"):
        bn.convert_to(layer, "group")
    bn.convert_to(layer, "group")
