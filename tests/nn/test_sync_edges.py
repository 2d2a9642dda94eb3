"""Synchronized layers where ranks differ, fail, or are alone."""

from __future__ import annotations

import os
import signal
import time

import pytest
import ranks
import torch
import torch.distributed as dist
from torch import nn

import batchnorm as bn


def raised(call, *args):
    try:
        call(*args)
    except Exception as error:
        return type(error).__name__, str(error)
    return None, None


def renorm_layer(cls):
    layer = cls(2, renorm=bn.Renorm(r_max=1.1, d_max=0.2), momentum=0.5)
    layer.running_mean.fill_(0.1)
    layer.running_var.fill_(0.8)
    return layer


def differing(rank):
    """What a rank sees of each case, as the values to compare."""
    found = {}
    layer = bn.SyncBatchNorm(2, momentum=1.0)

    with torch.no_grad():
        layer(torch.full((1, 2), float(rank)))
    found["no_grad"] = layer.running_mean.clone(), layer.running_var.clone()

    torch.manual_seed(rank)
    x = torch.randn(3, 2, requires_grad=rank == 0)  # on the other rank only gamma and beta have gradients
    layer(x).square().sum().backward()
    found["gradient on one rank"] = x.detach(), x.grad

    count = int(layer.num_batches_tracked)
    found["lonely"] = *raised(layer, torch.randn(1 - rank, 2)), int(layer.num_batches_tracked) - count
    layer.singleton = "running"
    y = layer(torch.ones(1 - rank, 2))
    found["lonely, running"] = y.detach(), layer.running_mean.clone(), int(layer.num_batches_tracked) - count

    before = layer.running_var.clone()
    found["all empty"] = layer(torch.randn(0, 2)).shape, torch.equal(layer.running_var, before)
    found["all masked"] = (
        layer(torch.full((2, 2, 3), torch.nan), mask=torch.zeros(2, 3, dtype=torch.bool)).abs().sum().item(),
        torch.equal(layer.running_var, before),
    )
    layer.eval()
    if rank == 0:  # no collective, or this would wait for the other rank
        found["eval"] = layer(torch.ones(1, 2)).shape
    layer.train()
    alone = dist.new_group([rank], use_local_synchronization=True)
    found["alone"] = torch.equal(bn.SyncBatchNorm(2, process_group=alone)(x.detach()), bn.BatchNorm1d(2)(x.detach()))
    found["functional"] = bn.batch_norm(x.detach(), training=True, process_group=dist.group.WORLD)
    renormed = renorm_layer(bn.SyncBatchNorm)
    for _ in range(2):
        z, mask = torch.randn(2 + rank, 2, 3), torch.rand(2 + rank, 3) > 0.3
        z.requires_grad_()
        y = renormed(z, mask=mask)
        y.cos().sum().backward()
    found["renorm"] = z.detach(), mask, y.detach(), z.grad, renormed.state_dict()
    x = x.detach().requires_grad_()
    found["twice"] = raised(lambda: torch.autograd.grad(layer(x).sum(), x, create_graph=True))
    dist.barrier()
    return found


@pytest.fixture(scope="module")
def both():
    return ranks.run(differing, 2)


@pytest.mark.processes
def test_without_gradients(both):
    for found in both:
        mean, variance = found["no_grad"]
        assert mean.tolist() == [0.5, 0.5]
        assert variance.tolist() == [0.5, 0.5]


@pytest.mark.processes
def test_a_rank_whose_input_needs_no_gradient_joins_the_backward(both):
    x = torch.cat([found["gradient on one rank"][0] for found in both]).double().requires_grad_()
    nn.functional.batch_norm(x, None, None, training=True).square().sum().backward()
    torch.testing.assert_close(both[0]["gradient on one rank"][1].double(), x.grad[:3], rtol=0, atol=1e-6)
    assert both[1]["gradient on one rank"][1] is None


@pytest.mark.processes
def test_one_value_in_total_raises_on_every_rank(both):
    for found in both:
        error, message, counted = found["lonely"]
        assert error == "LonelyValues"
        assert message.startswith("Expected more than 1 value per channel when training")
        assert counted == 0


@pytest.mark.processes
def test_one_value_in_total_by_the_running_statistics(both):
    (y, mean, counted), (nothing, *_) = (found["lonely, running"] for found in both)
    assert nothing.shape == (0, 2)
    assert counted == 0
    assert (y.sign() == (1 - mean).sign()).all()


@pytest.mark.processes
def test_nothing_at_all_moves_nothing(both):
    for found in both:
        assert found["all empty"] == ((0, 2), True)
        assert found["all masked"] == (0.0, True)


@pytest.mark.processes
def test_no_collective_in_eval_or_alone(both):
    assert both[0]["eval"] == (1, 2)
    assert all(found["alone"] for found in both)


@pytest.mark.processes
def test_renormalization_with_masks(both):
    layer = renorm_layer(bn.BatchNorm1d)  # in one process; itself compared with Keras elsewhere
    x, mask, y, dx = (torch.cat([found["renorm"][index] for found in both]) for index in range(4))
    state = both[0]["renorm"][4]
    # The statistics before the last of two batches: what that one then moved by half.
    moments = bn.Moments.measure(x, mask)
    layer.running_mean.copy_(2 * state["running_mean"] - moments.mean)
    layer.running_var.copy_(2 * state["running_var"] - moments.variance(unbiased=True))
    x.requires_grad_()
    whole = layer(x, mask=mask)
    whole.cos().sum().backward()
    torch.testing.assert_close(y, whole.detach(), rtol=0, atol=1e-5)
    torch.testing.assert_close(dx, x.grad, rtol=0, atol=1e-5)
    torch.testing.assert_close(layer.running_var, state["running_var"], rtol=0, atol=1e-6)
    assert torch.equal(state["running_var"], both[1]["renorm"][4]["running_var"])


@pytest.mark.processes
def test_function(both):
    x = torch.cat([found["gradient on one rank"][0] for found in both])
    y = torch.cat([found["functional"] for found in both])
    torch.testing.assert_close(y, nn.functional.batch_norm(x, None, None, training=True), rtol=0, atol=1e-6)


@pytest.mark.processes
def test_second_derivatives_are_refused(both):
    for found in both:
        assert found["twice"][0] == "RuntimeError"
        assert "supports only first derivatives" in found["twice"][1]


def test_without_a_process_group():
    x = torch.randn(4, 3, 2)
    layer = bn.SyncBatchNorm(3)
    assert torch.equal(layer(x), bn.BatchNorm1d(3)(x))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        layer(torch.randn(1, 3))
    with pytest.raises(ValueError, match="expected at least 2D input"):
        layer(torch.randn(3))
    mine, torchs = bn.SyncBatchNorm(3, 1e-3, None, False, True), nn.SyncBatchNorm(3, 1e-3, None, False, True)
    assert repr(mine) == repr(torchs)
    assert mine.state_dict().keys() == torchs.state_dict().keys()


def wrong_on_rank_1(rank):
    layer = bn.SyncBatchNorm(2)
    began = time.monotonic()
    error = raised(layer, torch.randn(4, 2 + rank))
    assert layer.num_batches_tracked == 0
    assert torch.equal(layer.running_mean, torch.zeros(2))
    return *error, time.monotonic() - began


@pytest.mark.processes
def test_a_bad_input_on_one_rank_ends_the_others():
    (error, message, seconds), (first, cause, _) = ranks.run(wrong_on_rank_1, 2, timeout=2.0)
    assert (first, error) == ("RuntimeError", "RuntimeError")
    assert cause.startswith("running_mean should contain 3 elements not 2")
    assert message.startswith("synchronized batch normalization got no answer from another rank")
    assert seconds < 10


def killed(rank):
    layer = bn.SyncBatchNorm(2)
    layer(torch.randn(4, 2)).sum().backward()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    layer(torch.randn(4, 2)).sum().backward()


@pytest.mark.processes
def test_a_rank_that_is_killed_ends_the_others():
    began = time.monotonic()
    (_, error), (_, other) = ranks.outcomes(killed, 2, timeout=5.0)
    assert other == "died with exit code -9"
    assert "Look for the rank that raised or died first" in error
    assert time.monotonic() - began < 20


def unlike(rank):
    """Layers of other widths on each rank: what is raised, and whether anything moved."""
    found = []
    for channels in ((3, 5), (2048, 2050), (4, 4)):
        model = nn.Sequential(nn.Identity(), bn.SyncBatchNorm(channels[rank]))
        said = raised(model, torch.randn(6, channels[rank]))
        found.append((*said, bool(model[1].running_mean.any()), int(model[1].num_batches_tracked)))
    return found


@pytest.mark.processes
@pytest.mark.kernels  # on devices where looking waits for nothing
def test_ranks_of_unlike_widths_are_told_on_every_rank_and_nothing_moves():
    for narrow, wide, same in ranks.run(unlike):
        for (kind, said, moved, count), channels in ((narrow, "[3, 5]"), (wide, "[2048, 2050]")):
            assert kind == "RanksDiffer"
            assert said.startswith("1: expected the same number of channels on every rank")
            assert channels in said
            assert (moved, count) == (False, 0)
        assert same == (None, None, True, 1)


def many_channels(rank):
    """More channels than one message holds."""
    torch.manual_seed(rank)
    layer = bn.SyncBatchNorm(2500, momentum=1.0)
    x = torch.randn(5 + rank, 2500)
    layer(x)
    return x, layer.running_mean, layer.running_var


@pytest.mark.processes
def test_more_channels_than_a_message_holds():
    found = ranks.run(many_channels)
    x = torch.cat([x for x, _, _ in found]).double()
    for _, mean, var in found:
        # One rounding of float32, of values of size 1.
        torch.testing.assert_close(mean.double(), x.mean(0), rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(var.double(), x.var(0), rtol=1e-6, atol=1e-7)
