"""Histograms of a probe, against NumPy's in float64 on what the layers really got."""

import sys

import numpy as np
import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.runs.schema import HISTOGRAM_BINS, HISTOGRAM_EDGES

# A share s is stored as 254 * sqrt(s), rounded: off by at most half of it, and by what float32 and an edge may do.
CODED = 0.5 / 254


def expected(x, eps):
    """Shares of (n, C) values; the end bins have no end."""
    x = np.asarray(x, np.float64)
    if not np.isfinite(x).all(0).all():
        return np.full((x.shape[1], HISTOGRAM_BINS), np.nan)
    xhat = (x - x.mean(0)) / np.sqrt(x.var(0) + eps)
    edges = HISTOGRAM_EDGES.copy()
    edges[[0, -1]] = -np.inf, np.inf
    return np.stack([np.histogram(column, edges)[0] for column in xhat.T]) / len(x)


def agree(shares, wanted):
    np.testing.assert_array_equal(np.isnan(shares), np.isnan(wanted))
    assert np.nanmax(abs(np.sqrt(shares) - np.sqrt(wanted)), initial=0) <= CODED + 1e-6


def recorded(folder, model, batches, layer, **options):
    """The histograms, and what the layer got, call after call."""
    got = []
    module = dict(model.named_modules())[layer]
    with bn.watch(model, folder) as w:
        handle = module.register_forward_hook(lambda _, args, out: got.append(args[0].detach().clone()))
        w.probe(batches, **options)
        handle.remove()
    run = bn.open_run(folder)
    assert run.damage == []
    return (*run.histograms(layer), got)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.ReLU())


def test_shares_of_torchs_layers(tmp_path):
    model = net()
    batches = [torch.randn(6, 2, 9, 9) * (1 + k) + k for k in range(10)]
    batches[3] **= 3  # long tails
    steps, channels, shares, got = recorded(tmp_path / "run", model, batches, "1")
    assert (steps.tolist(), channels.tolist()) == ([0], [0, 1, 2, 3, 4])
    assert (shares.shape, shares.dtype) == ((1, 8, 5, 32), np.float32)
    for k, x in enumerate(got[:8]):
        wanted = expected(x.transpose(0, 1).flatten(1).T, 1e-5)
        agree(shares[0, k], wanted)
        assert wanted[:, 1:-1].sum() > 4
    assert shares[0, 3, :, [0, -1]].max() > 0  # beyond the edges
    np.testing.assert_allclose(shares.sum(-1), 1, atol=0.02)


@pytest.mark.parametrize("eps", [1e-5, 1.0])
def test_what_comes_in_and_what_goes_out_have_the_same_histogram(tmp_path, eps):
    """mean + sqrt(var + eps) * edges, and beta + gamma * edges, hold the same shares of the inputs and the outputs."""
    model = nn.Sequential(nn.Identity(), nn.BatchNorm1d(2, eps=eps))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([2.0, -0.5]))
        model[1].bias.copy_(torch.tensor([1.0, 7.0]))
    x = torch.randn(500, 2) * torch.tensor([0.1, 3.0]) + 2
    _, _, shares, _ = recorded(tmp_path / "run", model, [x], "1")
    out = model.train()(x).detach().double().numpy()
    for c, (gamma, beta) in enumerate(((2.0, 1.0), (-0.5, 7.0))):
        edges = np.sort(beta + gamma * HISTOGRAM_EDGES)
        wanted = np.histogram(out[:, c], edges)[0][:: 1 if gamma > 0 else -1] / 500
        # A value next to an edge may fall on its other side in float32.
        assert abs(np.sqrt(shares[0, 0, c]) - np.sqrt(wanted))[1:-1].max() <= CODED + np.sqrt(1 / 500)
        assert abs(shares[0, 0, c] - wanted)[1:-1].sum() < 0.03


def test_masks_lengths_and_channels_last(tmp_path):
    layer = bn.BatchNorm1d(3, channel_dim=-1)
    model = nn.Sequential(layer)
    x = torch.randn(4, 7, 3) * 3
    lengths = torch.tensor([7, 1, 4, 2])
    inside = torch.arange(7) < lengths[:, None]
    x[~inside] = 50.0
    x[1, 5] = float("nan")  # is not looked at
    for name, call in {
        "mask": lambda m, x: m[0](x, mask=inside),
        "lengths": lambda m, x: m[0](x, lengths=lengths),
    }.items():
        _, _, shares, _ = recorded(tmp_path / name, model, [x], "0", call=call)
        agree(shares[0, 0], expected(x[inside], layer.eps))


def test_calls_of_one_batch_are_added(tmp_path):
    layer = nn.BatchNorm1d(3)
    model = nn.Sequential(layer, nn.Linear(3, 3), layer)
    _, _, shares, got = recorded(tmp_path / "run", model, [torch.randn(16, 3) * 2 + 5], "0")
    agree(shares[0, 0], (expected(got[0], 1e-5) + expected(got[1], 1e-5)) / 2)


def test_what_is_not_finite_dead_or_did_not_run(tmp_path):
    model = nn.ModuleDict({"a": nn.BatchNorm1d(4), "idle": nn.BatchNorm1d(2)})
    x = torch.randn(32, 4)
    x[0, 1], x[5, 2], x[:, 3] = float("nan"), float("inf"), 3.0
    _, _, shares, _ = recorded(tmp_path / "run", model, [x, x.nan_to_num(1, 1)], "a", call=lambda m, x: m["a"](x))
    agree(shares[0, 0, [0]], expected(x[:, [0]], 1e-5))
    assert np.isnan(shares[0, 0, 1:3]).all()
    assert shares[0, 0, 3].tolist() == [0.0] * 16 + [1.0] + [0.0] * 15  # all at 0
    assert np.isfinite(shares[0, 1]).all()
    assert np.isnan(bn.open_run(tmp_path / "run").histograms("idle")[2]).all()


def test_values_that_a_layer_passes_over_do_not_count(tmp_path):
    layer = bn.BatchNorm1d(2, nonfinite="skip")
    x = torch.randn(40, 2)
    x[3, 0] = float("inf")
    _, _, shares, _ = recorded(tmp_path / "run", nn.Sequential(layer), [x], "0")
    agree(shares[0, 0, [1]], expected(x[:, [1]], layer.eps))


def test_probes_of_unlike_numbers_of_batches_and_many_channels(tmp_path):
    model = nn.Sequential(nn.BatchNorm1d(300))
    x = torch.randn(3, 24, 300)
    with bn.watch(model, tmp_path / "run") as w:
        w.probe(x[:1])
        w.probe(x)
    _, channels, shares = bn.open_run(tmp_path / "run").histograms("0")
    assert (len(channels), channels[0], channels[-1]) == (128, 0, 299)
    assert set(np.diff(channels)) == {2, 3}
    assert shares.shape == (2, 3, 128, 32)
    assert np.isnan(shares[0, 1:]).all()
    for k in range(3):
        agree(shares[1, k], expected(x[k][:, channels], 1e-5))
    assert (tmp_path / "run" / "histograms-0001.bin").stat().st_size == 4 * 128 * 32 + 2 * 20


def test_in_blocks_as_at_once(tmp_path, monkeypatch):
    model, batches = net(), [torch.randn(6, 2, 9, 9)]
    whole = recorded(tmp_path / "whole", model, batches, "1")[2]
    monkeypatch.setattr(sys.modules[bn.watch.__module__.replace("recorder", "histograms")], "_BLOCK", 1)
    np.testing.assert_array_equal(recorded(tmp_path / "blocks", model, batches, "1")[2], whole)
