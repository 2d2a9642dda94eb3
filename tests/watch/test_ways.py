"""The batch moments against float64 recomputation, for each of the four ways in which they are had."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.watch.hooks import LayerWatch
from batchnorm.watch.snapshot import Way

# Every way ends in a float32, with a relative error of 2^-24, and begins with float32 results of torch's: its mean is
# off by a few ulp of the largest |x| (here below 16), its rstd by a few ulp, which is twice that in the variance.
# Inverting the running average divides their rounding (they are about as large as the batch's) by the momentum, 0.1.
TOLERANCE = {"saved": 8 * 2**-24, "measured": 8 * 2**-24, "handed over": 2 * 2**-24, "inverted": 40 * 2**-24}


class Caught(nn.Module):
    """A layer in a model, which keeps what went into it."""

    def __init__(self, layer):
        super().__init__()
        self.first = nn.Linear(1, 1)
        self.layer = layer
        self.inputs = []

    def forward(self, x):
        self.inputs.append(x.detach().double().transpose(0, 1).flatten(1))
        return self.layer(x)


class HandsOver(nn.BatchNorm2d):
    """The contract of `measured`, kept by a layer that is none of ours."""

    measured = None

    def forward(self, input):
        wide = input.detach().double()
        mean, variance = wide.mean((0, 2, 3)), wide.var((0, 2, 3), correction=0)
        count = input.numel() // input.shape[1]
        self.measured = type("Moments", (), {"count": count, "mean": mean, "m2": variance * count})()
        return super().forward(input).relu()


class Fused(nn.BatchNorm2d):
    """Torch's node is not the last one: neither saved nor handed over."""

    def forward(self, input):
        return super().forward(input).relu()


def train(model, folder, *, steps=4, every=1, call=None, shape=(5, 3, 4, 4), forwards=1):
    """Watch some steps on inputs with mean 3 and deviation 2; returns the run and the true (mean, variance) of each."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    truth = []
    with bn.watch(model, folder, optimizer=optimizer, every=every):
        for _ in range(steps):
            model.inputs.clear()
            for _ in range(forwards):
                x = torch.randn(shape, generator=generator, dtype=torch.float64) * 2 + 3
                x = x.to(next(model.parameters()).dtype)
                (call or model)(x).square().mean().backward()
            if model.inputs:
                seen = torch.cat(model.inputs, 1)
                truth.append((seen.mean(1).numpy(), seen.var(1, correction=0).numpy()))
            optimizer.step()
            optimizer.zero_grad()
    return bn.open_run(folder), truth


def check(run, truth, tolerance):
    for quantity, column in (("batch_mean", 0), ("batch_var", 1)):
        steps, found = run.vectors("layer", quantity)
        expected = np.array([truth[step][column] for step in steps])
        np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance * 16)
    assert not run.alerts()


@pytest.fixture
def ways(monkeypatch):
    """The ways that were taken."""
    taken = []
    original = LayerWatch._moment

    def spy(self, *args):
        moment = original(self, *args)
        taken.append(moment.way)
        return moment

    monkeypatch.setattr(LayerWatch, "_moment", spy)
    return taken


SHAPES = {nn.BatchNorm1d: (6, 3, 5), nn.BatchNorm2d: (5, 3, 4, 4), nn.BatchNorm3d: (4, 3, 2, 3, 2)}


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("tracks", [True, False])
def test_saved_by_torch(tmp_path, ways, kind, momentum, affine, tracks):
    layer = kind(3, momentum=momentum, affine=affine, track_running_stats=tracks)
    model = Caught(layer)
    run, truth = train(model, tmp_path, shape=SHAPES[kind], call=lambda x: model(x * model.first.weight[0, 0]))
    assert set(ways) == {Way.RSTD}
    check(run, truth, TOLERANCE["saved"])
    assert set(run.counts("layer")) == {np.prod(SHAPES[kind]) // 3}


@pytest.mark.parametrize("eps", [1e-5, 10.0])
def test_saved_takes_eps_off(tmp_path, eps):
    run, truth = train(Caught(nn.BatchNorm2d(3, eps=eps)), tmp_path)
    # var = 1 / rstd^2 - eps cancels: the error is relative to var + eps, and var is 4.
    check(run, truth, TOLERANCE["saved"] * (1 + eps / 4))


@pytest.mark.parametrize("layer", [HandsOver(3), bn.BatchNorm2d(3), bn.BatchNorm2d(3, activation="relu")])
def test_handed_over(tmp_path, ways, layer):
    run, truth = train(Caught(layer), tmp_path)
    assert set(ways) == {Way.M2}
    check(run, truth, TOLERANCE["handed over"])


def test_handed_over_counts_what_the_mask_leaves(tmp_path):
    model = Caught(bn.BatchNorm2d(3))
    mask = torch.rand(5, 4, 4, generator=torch.Generator().manual_seed(1)) < 0.6
    run, _ = train(model, tmp_path, call=lambda x: model.layer(x, mask=mask))
    assert set(run.counts("layer")) == {int(mask.sum())}


def test_what_an_earlier_forward_measured_is_not_taken(tmp_path, ways):
    """A layer whose `measured` is stale, for it stopped setting it, is measured in another way."""
    layer = HandsOver(3)
    layer(torch.randn(5, 3, 4, 4))
    layer.__class__ = Fused
    layer.measured = layer.__dict__["measured"]
    run, truth = train(Caught(layer), tmp_path)
    assert set(ways) == {Way.INVERT}
    check(run, truth, TOLERANCE["inverted"])


@pytest.mark.parametrize("momentum", [0.1, 0.9, 1.0, None])
def test_inverted(tmp_path, ways, momentum):
    run, truth = train(Caught(Fused(3, momentum=momentum)), tmp_path)
    assert set(ways) == {Way.INVERT}
    check(run, truth, TOLERANCE["inverted"])
    assert set(run.counts("layer")) == {80}
    assert set(run.forwards("layer")) == {1}


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("every", [1, 2])
def test_inverted_where_no_hook_is_called(tmp_path, momentum, every):
    """As in a compiled model: its counter alone says that the layer ran. How large the batch was nobody knows."""
    model = Caught(nn.BatchNorm2d(3, momentum=momentum))
    run, truth = train(
        model, tmp_path, every=every, call=lambda x: (model.inputs.append(_flat(x)), _unhooked(model, x))[1]
    )
    assert set(run.counts("layer")) == {-1}
    assert set(run.forwards("layer")) == {1}
    n = 80
    check(run, [(mean, variance * n / (n - 1)) for mean, variance in truth], TOLERANCE["inverted"])


def _flat(x):
    return x.detach().double().transpose(0, 1).flatten(1)


def _unhooked(model, x):
    layer = model.layer
    layer.num_batches_tracked += 1
    share = 1 / int(layer.num_batches_tracked) if layer.momentum is None else layer.momentum
    return nn.functional.batch_norm(
        x, layer.running_mean, layer.running_var, layer.weight, layer.bias, True, share, layer.eps
    )


@pytest.mark.parametrize("case", ["no grad", "not tracked", "momentum 0", "half", "saved in half", "every 2"])
def test_measured(tmp_path, ways, case):
    kind = nn.BatchNorm2d if case == "saved in half" else Fused
    layer = kind(3, track_running_stats=case != "not tracked", momentum=0.0 if case == "momentum 0" else 0.1)
    model = Caught(layer)

    def call(x):
        if case == "no grad":
            with torch.no_grad():
                model(x)
            return model.first.weight
        return model(x)

    if "half" in case:
        model = model.bfloat16()
    run, truth = train(model, tmp_path, call=call, every=2 if case == "every 2" else 1)
    # Before the first step it is known where the running statistics stand, in the midst of unrecorded ones it is not.
    assert set(ways[case == "every 2" :]) == {Way.VARIANCE}
    check(run, truth, TOLERANCE["inverted" if case == "every 2" else "measured"])


def test_measured_without_cancellation(tmp_path):
    """Mean 1000, deviation 1e-2: E[x^2] - E[x]^2 would be off by 1e6 * 2^-24 even in float32's best case."""
    model = Caught(nn.BatchNorm2d(3, track_running_stats=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with bn.watch(model, tmp_path, optimizer=optimizer), torch.no_grad():
        model(torch.randn(50, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 1e-2 + 1e3)
        optimizer.step()
    _, variance = bn.open_run(tmp_path).vectors("layer", "batch_var")
    np.testing.assert_allclose(variance[0], model.inputs[0].var(1, correction=0).numpy(), rtol=2**-22)


@pytest.mark.parametrize("layer", [nn.BatchNorm2d(3), bn.BatchNorm2d(3), Fused(3, track_running_stats=False)])
def test_forwards_within_a_step_are_pooled(tmp_path, layer):
    """As in gradient accumulation: the moments of all that the layer saw, the spread between the batches included."""
    model = Caught(layer)
    offsets = iter(range(100))
    run, truth = train(model, tmp_path, forwards=3, call=lambda x: model(x + next(offsets)))
    # The pooled mean and variance grow with the offset, up to 15 and 8 here, and are merged in float32.
    check(run, truth, 8 * TOLERANCE["saved"])
    assert set(run.forwards("layer")) == {3}
    assert set(run.counts("layer")) == {240}


def test_a_layer_that_turns_out_to_run_twice_is_measured_from_then_on(tmp_path):
    run, truth = train(Caught(Fused(3)), tmp_path, forwards=2)
    assert set(run.forwards("layer")) == {2}
    for quantity, column in (("batch_mean", 0), ("batch_var", 1)):
        _, found = run.vectors("layer", quantity)
        assert np.isnan(found[0]).all()
        expected = [pair[column] for pair in truth[1:]]
        np.testing.assert_allclose(found[1:], expected, rtol=TOLERANCE["measured"], atol=16 * TOLERANCE["measured"])
    assert np.isnan(run.stats("layer", "batch_mean")[0]).all()
    assert not run.alerts()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("layer", [nn.BatchNorm2d(3), bn.BatchNorm2d(3), Fused(3)])
def test_checkpointing_is_left_alone(tmp_path, reentrant, layer):
    """Reading what autograd saved would recompute the forward at once: the running statistics would move once more."""
    from torch.utils.checkpoint import checkpoint

    def build():
        model = Caught(copy.deepcopy(layer))
        block = nn.Sequential(model, nn.Sigmoid())
        return model, lambda x: checkpoint(block, x.requires_grad_(), use_reentrant=reentrant)

    watched, call = build()
    run, truth = train(watched, tmp_path, call=call)
    bare, call = build()
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(bare.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        call(
            (torch.randn(5, 3, 4, 4, generator=generator, dtype=torch.float64) * 2 + 3).float()
        ).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, value in bare.layer.state_dict().items():
        assert torch.equal(watched.layer.state_dict()[name], value), name
    assert set(run.counts("layer")) == {80}
    assert set(run.forwards("layer")) == {2}
    if not isinstance(layer, Fused) or reentrant:
        check(run, truth, TOLERANCE["measured"])
