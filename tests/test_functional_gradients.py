"""Gradients at any mean: nearer to float64 than twice the error of the better of torch's two layouts."""

import pytest
import torch
import torch.nn.functional as F
from cases import laid_out

import batchnorm as bn
from batchnorm import reference

LAYOUTS = ("contiguous", "channels_last")


def errors(function, x, weight, bias, dy, layout, exact):
    """Root of the mean squared error of dx, dweight and dbias.

    The largest error of a few sums is luck; their mean square over channels is not.
    """
    leaves = [laid_out(x, layout).requires_grad_(), weight.clone().requires_grad_(), bias.clone().requires_grad_()]
    y = function(leaves[0], None, None, *leaves[1:], training=True)
    found = torch.autograd.grad(y, leaves, laid_out(dy, layout))
    return torch.stack([(a.double() - b).square().mean().sqrt() for a, b in zip(found, exact, strict=False)])


@pytest.mark.kernels
@pytest.mark.parametrize("mean", [0.0, 1.0, 1e3, 1e4, 1e5, 1e6])
def test_within_twice_the_error_of_the_better_of_torchs_layouts(mean):
    shape = (16, 64, 32, 32)
    x, dy = torch.randn(shape) + mean, torch.randn(shape)
    weight, bias = torch.rand(64) + 0.5, torch.randn(64)
    exact = reference.backward(dy, x, weight, bias)
    given = (x, weight, bias, dy)
    torchs = torch.stack([errors(F.batch_norm, *given, layout, exact) for layout in LAYOUTS]).amin(0)
    for layout in LAYOUTS:
        ours = errors(bn.batch_norm, *given, layout, exact)
        assert (ours <= 2 * torchs).all(), (layout, ours.tolist(), torchs.tolist())
        # However far torch's is off: a few roundings of dx, whose size is 1, whatever the mean.
        assert ours[0] <= 2 * torch.finfo(torch.float32).eps
