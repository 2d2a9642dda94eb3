"""What torch.nn's layers get wrong and ours right, side by side: each test says so when torch has mended it."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import batchnorm as bn
from batchnorm import reference


@pytest.mark.parametrize("mean", [1e4, 1e5])
def test_float32_outputs_do_not_lose_their_digits_to_a_large_mean(mean):
    x = (torch.randn(64, 8, 32, 32) + mean).contiguous(memory_format=torch.channels_last)
    exact = reference.forward(x).y
    near = exact.abs() <= 6

    def error(layer):
        return (layer(x) - exact)[near].abs().max().item()

    assert error(nn.BatchNorm2d(8)) > 1e-2
    assert error(bn.BatchNorm2d(8)) <= 4e-6


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputed_batch_is_tracked_once(reentrant):
    def tracked(layer):
        x = torch.randn(8, 3, requires_grad=True)
        checkpoint(layer, x, use_reentrant=reentrant).sum().backward()
        return layer.num_batches_tracked.item()

    assert tracked(nn.BatchNorm1d(3)) == 2
    assert tracked(bn.BatchNorm1d(3)) == 1


def test_running_statistics_of_a_bfloat16_module_do_not_stall():
    # Toward 2.85 by a thousandth of the way a step: 0.999^4000 = 1.8 % of it is left, and bfloat16 has 3 digits.
    x = torch.randn(256, 1, dtype=torch.bfloat16) * 0.1 + 2.85

    def reached(layer):
        for _ in range(4000):
            layer(x)
        return layer.running_mean.item()

    assert reached(nn.BatchNorm1d(1, momentum=1e-3).bfloat16()) < 1.5
    assert reached(bn.BatchNorm1d(1, momentum=1e-3).bfloat16()) == pytest.approx(2.85 * (1 - 0.999**4000), rel=1e-2)


@pytest.mark.slow
def test_a_cumulative_average_is_one_graph():
    x = torch.randn(8, 3)
    with pytest.raises((torch._dynamo.exc.Unsupported, torch._dynamo.exc.UserError)):
        torch.compile(nn.BatchNorm1d(3, momentum=None), fullgraph=True, backend="eager")(x)
    layer = bn.BatchNorm1d(3, momentum=None)
    eager = copy.deepcopy(layer)
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="eager")(x), eager(x))
