"""fold() of batch norms and neighbors of other classes than torch.nn's, and of models that copy oddly."""

import copy

import pytest
import torch
import torch.nn.functional as F
from lookalikes import BatchNormAct2d, FrozenBatchNorm2d
from torch import nn

import batchnorm as bn
from batchnorm.tools.fold import folding
from batchnorm.tools.fold.weights import folded_into

# Outputs are sums of some 30 products of numbers near 1, in float64: 1e-12 of the largest is thousands of ulp.
EXACT = 1e-12


def trained(model):
    """In eval mode and float64, with all vectors of the batch norms away from the initial ones."""
    for module in model.modules():
        if getattr(module, "running_var", None) is not None:
            for name in ("weight", "bias", "running_mean", "running_var"):
                nn.init.uniform_(getattr(module, name), 0.5, 1.5)
    return model.double().eval()


def check(model, x, folded, refused=()):
    """Folds; the result computes the same, and these are gone."""
    expected = model(x)
    result = bn.fold(model, x)
    assert sorted(result.folding.folded) == sorted(folded)
    assert sorted(result.folding.refused) == sorted(refused)
    assert (result(x) - expected).abs().max() <= EXACT * expected.abs().max()
    assert result.folding.error <= EXACT
    return result


@pytest.mark.parametrize("act", [nn.ReLU(inplace=True), nn.Mish(), nn.Identity()], ids=str)
@pytest.mark.parametrize("drop", [None, nn.Dropout2d(0.3)], ids=str)
@pytest.mark.parametrize("converted", [False, True])
def test_a_norm_with_activation_leaves_the_activation(act, drop, converted):
    layer = BatchNormAct2d(4, copy.deepcopy(act), drop)
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3), bn.convert(layer) if converted else layer))
    result = check(model, torch.randn(2, 3, 8, 8).double(), ["1"])
    kept = [part for part in (drop, act) if part is not None and type(part) is not nn.Identity]
    assert [type(m) for m in result[1].modules() if not any(m.children())] == [type(p) for p in kept or [nn.Identity()]]


@pytest.mark.parametrize("training", [False, True])
def test_a_frozen_lookalike_folds_in_train_mode_too(training):
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3), FrozenBatchNorm2d(4, eps=1e-2), nn.ReLU()))
    check(model.train(training), torch.randn(2, 3, 8, 8).double(), ["1"])


class Named(nn.Conv2d):
    """A subclass that computes what its base does."""


class Standardized(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight - weight.mean((1, 2, 3), keepdim=True), bias)


class Same(nn.Conv2d):
    def forward(self, x):
        return super().forward(F.pad(x, (0, 1, 0, 1)))


@pytest.mark.parametrize(("kind", "folds"), [(Named, True), (Standardized, False), (Same, False)])
def test_a_subclass_of_a_convolution_folds_if_it_computes_what_torchs_does(kind, folds):
    model = trained(nn.Sequential(kind(3, 4, 3), nn.BatchNorm2d(4)))
    check(model, torch.randn(2, 3, 8, 8).double(), *([["1"], []] if folds else [[], ["1"]]))


class LinearNorm(nn.Module):
    """A linear layer and a batch norm over all positions, as LeViT has them."""

    def __init__(self, reshape):
        super().__init__()
        self.linear, self.bn, self.reshape = nn.Linear(5, 6), nn.BatchNorm1d(6), reshape

    def forward(self, x):
        x = self.linear(x)
        return self.reshape(self.bn(x.flatten(0, 1)), x)


RESHAPES = {
    "reshape_as": lambda y, x: y.reshape_as(x),
    "view_as": lambda y, x: y.view_as(x),
    "shape": lambda y, x: y.view(x.shape),
    "size": lambda y, x: y.view(x.size()),
}


@pytest.mark.parametrize("reshape", RESHAPES)
def test_a_linear_layer_takes_the_batch_norm_after_a_flatten(reshape):
    check(trained(LinearNorm(RESHAPES[reshape])), torch.randn(2, 7, 5).double(), ["bn"])


FLATTENED = {
    "function": lambda x: torch.flatten(x, 0, 1),
    "by name": lambda x: x.flatten(start_dim=0, end_dim=1),
    "reshape": lambda x: x.reshape(-1, 6),
    "view of shape": lambda x: x.view((-1, x.shape[-1])),
    "reshape of a size": lambda x: torch.reshape(x, (-1, x.size(-1))),
    "reshape of sizes": lambda x: x.reshape(-1, x.size()[-1]),
}


class Flattened(nn.Module):
    def __init__(self, layer, flatten, channels):
        super().__init__()
        self.layer, self.bn, self.flatten = layer, nn.BatchNorm1d(channels), flatten

    def forward(self, x):
        return self.bn(self.flatten(self.layer(x)))


@pytest.mark.parametrize("flatten", FLATTENED)
def test_however_the_flatten_is_written(flatten):
    model = Flattened(nn.Linear(5, 6), FLATTENED[flatten], 6)
    check(trained(model), torch.randn(2, 7, 5).double(), ["bn"])


OTHER_CHANNELS = {
    "of a convolution": (nn.Conv1d(3, 6, 1), lambda x: x.flatten(0, 1)),
    "of a convolution, reshaped": (nn.Conv1d(3, 6, 1), lambda x: x.reshape(-1, x.shape[-1])),
    "of other dimensions": (nn.Linear(6, 6), lambda x: x.flatten(1, 2).view(-1, 6, 6)),
    "halved": (nn.Linear(6, 12), lambda x: x.reshape(-1, 6)),
    "of another size": (nn.Linear(6, 6), lambda x: x.reshape(-1, x.shape[1])),
    "of strides": (nn.Linear(6, 6), lambda x: x.reshape(-1, 6 * x.stride()[-1])),
}


@pytest.mark.parametrize("case", OTHER_CHANNELS)
@pytest.mark.parametrize("example", [True, False])
def test_not_where_the_flatten_makes_other_channels(case, example):
    layer, flatten = OTHER_CHANNELS[case]
    model, x = trained(Flattened(layer, flatten, 6)), torch.randn(2, layer.weight.size(1), 6).double()
    if isinstance(layer, nn.Linear):
        x = torch.randn(2, 6, 6).double()
    assert list(bn.fold(model, x if example else None).folding.refused) == ["bn"]


def test_not_where_the_values_before_are_used_too():
    check(trained(LinearNorm(lambda y, x: y.view_as(x) + x)), torch.randn(2, 7, 5).double(), [], ["bn"])


class Rebuilt(nn.Module):
    """Comes back in train mode from a copy, as a module that is rebuilt by its own __deepcopy__ does."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.bn(self.conv(x))

    def __deepcopy__(self, memo):
        twin = type(self)().to(self.conv.weight.dtype)
        twin.load_state_dict(self.state_dict())
        return twin


class Forgetful(Rebuilt):
    """Comes back with other values from a copy."""

    def __deepcopy__(self, memo):
        return type(self)().to(self.conv.weight.dtype)


def test_each_module_of_the_copy_has_its_mode():
    result = check(trained(Rebuilt()), torch.randn(2, 3, 8, 8).double(), ["bn"])
    assert not any(module.training for module in result.modules())


def test_a_copy_that_is_another_model_is_refused():
    with pytest.raises(ValueError, match="a deep copy of Forgetful differs"):
        bn.fold(trained(Forgetful()))


def test_a_model_that_keeps_what_autograd_made_is_folded():
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    x = torch.randn(2, 3, 8, 8).double()
    model.last = model(x)
    model.cache = {"biases": [model.last * 2]}
    model.last.sum().backward()
    gradient = model[0].weight.grad
    check(model, x, ["1"])
    assert model[0].weight.grad is gradient


def test_the_given_model_is_left_as_it_was_though_it_runs():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout()).train()
    model[1].eval()
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    bn.fold(model, torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [m.training for m in model.modules()] == [True, True, False, True]


def test_the_error_is_relative():
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).float()
    model[1].weight.data.mul_(1e6)
    folded = bn.fold(model, x := torch.randn(2, 3, 8, 8))
    assert (folded(x) - model(x)).abs().max() > 1e-3  # an absolute error says nothing
    assert 0 < folded.folding.error < 1e-5


@pytest.mark.slow
def test_the_model_in_a_compiled_one_is_folded():
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    folded = bn.fold(torch.compile(model, backend="eager"))
    assert type(folded) is nn.Sequential
    assert folded.folding.folded == {"1": "0"}


def test_the_model_in_a_data_parallel_one_is_folded():
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    folded = bn.fold(nn.DataParallel(model), x := torch.randn(2, 3, 8, 8).double())
    assert folded.folding.folded == {"1": "0"}
    assert (folded(x) - model(x)).abs().max() <= EXACT * model(x).abs().max()


class InFloat32(nn.Module):
    """Cannot run in float64."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.bn(self.conv(x.float()))


def test_a_forward_without_float64_is_judged_by_half_the_digits_it_has(monkeypatch):
    model, x = trained(InFloat32()).float(), torch.randn(2, 3, 8, 8)
    assert bn.fold(model, x).folding.folded == {"bn": "conv"}

    def wrong(found, other, before):
        weight, bias = folded_into(found, other, before)
        # 1e-3 is more than half of float32's digits, 3.5e-4, and less than a third, 4.9e-3
        return nn.Parameter(weight * 1.001), nn.Parameter(bias * 1.001)

    monkeypatch.setattr(folding, "folded_into", wrong)
    with pytest.raises(RuntimeError, match=r"rounding explains 0\.000345"):
        bn.fold(model, x)
