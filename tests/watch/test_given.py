"""Recording and probing layers that have their channels elsewhere, masks, other variances, or are subclasses."""

import numpy as np
import pytest
import torch
from lookalikes import BatchNormAct2d, FrozenBatchNorm2d
from torch import nn

import batchnorm as bn

SCALE = torch.arange(1, 6.0)


def record(model, steps, folder, probes=()):
    """The run of a training on these batches."""
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    with bn.watch(model, folder, optimizer=optimizer) as w:
        for x in steps:
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
        if probes:
            w.probe(probes)
    return bn.open_run(folder)


@pytest.mark.slow
@pytest.mark.parametrize("length", [5, 7])
@pytest.mark.parametrize("compiled", [False, True])
def test_channels_in_the_last_dimension(length, compiled, tmp_path):
    model = nn.Sequential(bn.BatchNorm1d(5, channel_dim=-1))
    batches = [torch.randn(32, length, 5) * SCALE for _ in range(3)]
    watched = torch.compile(model, backend="eager") if compiled else model
    run = record(watched, batches, tmp_path / "run", batches[:2])
    assert run.damage == []
    # Inverted from running statistics that are float32, and kept as float32: a few ulp, ten times for the momentum.
    exact = [x.flatten(0, 1).double().var(0, correction=0).numpy() for x in batches]
    np.testing.assert_allclose(run.vectors("0", "batch_var")[1], exact, rtol=2e-5)
    np.testing.assert_allclose(run.probes("0", "batch_var")[1][0], exact[:2], rtol=1e-6)


def test_a_probe_counts_what_the_mask_says(tmp_path):
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = bn.BatchNorm1d(5)

        def forward(self, x):
            return self.norm(x, lengths=torch.arange(1, 9))

    x = torch.randn(8, 5, 8) * SCALE[:, None]
    x[0, :, 1:] = 1e6  # padding
    run = record(Masked(), [x], tmp_path / "run", [x])
    kept = torch.cat([x[i, :, : i + 1] for i in range(8)], 1).double()
    for values in (run.vectors("norm", "batch_mean")[1][0], run.probes("norm", "batch_mean")[1][0, 0]):
        np.testing.assert_allclose(values, kept.mean(1).numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("unbiased", [True, False])
def test_a_variance_is_undone_as_it_was_tracked(unbiased, tmp_path):
    model = nn.Sequential(bn.BatchNorm1d(5, unbiased=unbiased))
    batches = [torch.randn(4, 5) * SCALE for _ in range(3)]
    run = record(torch.compile(model, backend="eager"), batches, tmp_path / "run")
    exact = [x.double().var(0, correction=0).numpy() for x in batches]
    # of four values the two variances differ by a third
    np.testing.assert_allclose(run.vectors("0", "batch_var")[1], exact, rtol=2e-5)


@pytest.mark.parametrize("converted", [False, True])
def test_a_norm_with_activation_is_recorded(converted, tmp_path):
    model = nn.Sequential(BatchNormAct2d(5))
    if converted:
        bn.convert(model)
    batches = [torch.randn(4, 5, 3, 3) * SCALE[:, None, None] for _ in range(3)]
    run = record(model, batches, tmp_path / "run")
    exact = [x.double().mean((0, 2, 3)).numpy() for x in batches]
    np.testing.assert_allclose(run.vectors("0", "batch_mean")[1], exact, rtol=1e-4, atol=1e-5)


def test_frozen_lookalikes_are_named_and_not_recorded(tmp_path):
    model = nn.Sequential(nn.BatchNorm2d(3), FrozenBatchNorm2d(3))
    with pytest.warns(UserWarning, match="1 of 2 batch norms are not recorded, from 1 on: a FrozenBatchNorm2d"):
        run = record(model, [torch.randn(2, 3, 4, 4)], tmp_path / "run")
    assert [layer.name for layer in run.layers] == ["0"]
    with pytest.raises(ValueError, match="has only frozen ones"):
        bn.watch(nn.Sequential(FrozenBatchNorm2d(3)), tmp_path / "other")


@pytest.mark.processes
@pytest.mark.slow
def test_names_are_those_without_what_is_compiled_within(tmp_path):
    torch._dynamo.reset()
    inner = torch.compile(nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5)), backend="eager")
    model = torch.compile(nn.Sequential(inner, nn.BatchNorm1d(5)), backend="eager")
    run = record(model, [torch.randn(4, 5)], tmp_path / "run", [torch.randn(4, 5)])
    assert [layer.name for layer in run.layers] == ["0.1", "1"]
    assert np.isfinite(run.probes("0.1", "batch_var")[1]).all()
    w = bn.watch(model, tmp_path / "one", layers=["0.*"])
    w.close("interrupted")
    assert [layer.name for layer in bn.open_run(w.path).layers] == ["0.1"]


def test_a_model_without_batch_norm_says_of_what_it_is_made(tmp_path):
    with pytest.raises(ValueError, match="must have a batch norm to watch, but has only Linear"):
        bn.watch(nn.Sequential(nn.Linear(2, 2)), tmp_path / "run")


class Given(nn.Module):
    """A layer with whatever a call of it takes."""

    def __init__(self, layer, **options):
        super().__init__()
        self.norm, self.options = layer, options

    def forward(self, x):
        return self.norm(x, **self.options)


MASK = torch.rand(8, 6, generator=torch.Generator().manual_seed(3)) < 0.6
LENGTHS = torch.tensor([1, 2, 3, 4, 5, 6, 6, 0])
COUNTED = torch.arange(6) < LENGTHS[:, None]
# What a call is given, and which of (8, 6) places count. Every variance is of another divisor, place or sample.
CASES = {
    "mask": (lambda: Given(bn.BatchNorm1d(5), mask=MASK), MASK),
    "lengths": (lambda: Given(bn.BatchNorm1d(5), lengths=LENGTHS), COUNTED),
    "both": (lambda: Given(bn.BatchNorm1d(5), mask=MASK, lengths=LENGTHS), MASK & COUNTED),
    "channel_dim": (lambda: Given(bn.BatchNorm1d(5, channel_dim=-1), mask=MASK), MASK),
    "virtual batches": (lambda: Given(bn.BatchNorm1d(5, virtual_batch_size=2), mask=MASK), MASK),
    "biased": (lambda: Given(bn.BatchNorm1d(5, unbiased=False)), torch.ones(8, 6, dtype=torch.bool)),
    "untracked": (lambda: Given(bn.BatchNorm1d(5, track_running_stats=False), mask=MASK), MASK),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("way", ["handed over", "no grad"])
def test_what_a_call_had_is_what_is_recorded(case, way, tmp_path):
    build, counted = CASES[case]
    model, batches = build(), [torch.randn(8, 5, 6) * SCALE[:, None] + SCALE[:, None] for _ in range(3)]
    exact = [x.double().transpose(1, 2)[counted] for x in batches]
    given = [x.transpose(1, 2).contiguous() for x in batches] if case == "channel_dim" else batches
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    with bn.watch(model, tmp_path / "run", optimizer=optimizer) as w:
        for x in given:
            if way == "no grad":
                with torch.no_grad():
                    model(x)
            else:
                model(x).square().sum().backward()
            optimizer.step()
        w.probe(given)
    run = bn.open_run(tmp_path / "run")
    for found in (run.vectors, lambda *of: (None, run.probes(*of)[1][0])):
        mean, variance = (found("norm", quantity)[1] for quantity in ("batch_mean", "batch_var"))
        np.testing.assert_allclose(mean, [x.mean(0).numpy() for x in exact], rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(variance, [x.var(0, correction=0).numpy() for x in exact], rtol=1e-6)
    assert set(run.counts("norm")) == {int(counted.sum())}


def test_a_single_value_normalized_by_the_running_statistics_is_no_measurement(tmp_path):
    layer = bn.BatchNorm1d(5, singleton="running")
    batches = [torch.randn(size, 5) * SCALE for size in (4, 1, 3)]
    run = record(nn.Sequential(layer), batches, tmp_path / "run", batches)
    assert run.counts("0").tolist() == [4, 0, 3]
    for values in (run.vectors("0", "batch_var")[1], run.probes("0", "batch_var")[1][0]):
        assert np.isfinite(values).all(1).tolist() == [True, False, True]
    assert run.alerts() == []
