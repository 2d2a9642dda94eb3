"""Each step of the pipeline, by the compiled operator where there is one for the input, else on plain operators.

    forward:  measure -> merge -> normalize            backward:  reduce -> merge -> apply

`forward` and `backward` are the two halves with nothing to merge with, in one call, so that the second reading of x may
find it in cache.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..activations import Activation
from . import plain
from .load import COMPILED
from .plain import Affine

_COMPILED_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def compiled(x: Tensor) -> bool:
    """Whether the compiled operators serve this input."""
    return COMPILED and x.device.type == "cpu" and x.dtype in _COMPILED_DTYPES


def under_transform() -> bool:
    """Whether forward mode or a transform of torch.func is at work, eager or compiled.

    Then plain operators compute, for they compose with any transform: an autograd.Function has one backward, which
    forward mode cannot differentiate again, and a compiled operator has no derivative of its own.
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def rstd_of(count: Tensor, m2: Tensor, eps: float) -> Tensor:
    """1 / sqrt(var + eps), (C,) float64, with the biased variance m2 / count (0 where count is 0)."""
    return torch.rsqrt(m2 / count.clamp(min=1) + eps)


def measure(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Count (int64, ()), mean and m2 (float64, (C,)) of each channel of x."""
    if compiled(x):
        return torch.ops.batchnorm.measure(x, mask)
    return plain.measure(x, mask)


def normalize(
    x: Tensor, affine: Affine, residual: Tensor | None, mask: Tensor | None, activation: Activation
) -> Tensor:
    """y = act((x - mean) * rstd * weight + bias + residual), 0 where the mask is False, in x's dtype."""
    if compiled(x):
        return torch.ops.batchnorm.normalize(x, *affine, residual, mask, activation.code, activation.slope)
    return plain.normalize(x, affine, residual, mask, activation)


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    eps: float,
    activation: Activation,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y, and the count, mean, m2 and rstd it was normalised with: those of x."""
    if compiled(x) and mask is None:
        y, mean, m2, rstd = torch.ops.batchnorm.forward(
            x, weight, bias, residual, eps, activation.code, activation.slope
        )
        return y, torch.full((), x.numel() // max(x.size(1), 1), dtype=torch.int64, device=x.device), mean, m2, rstd
    count, mean, m2 = measure(x, mask)
    rstd = rstd_of(count, m2, eps)
    return normalize(x, Affine(mean, rstd, weight, bias), residual, mask, activation), count, mean, m2, rstd


def infer(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    activation: Activation,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, and the mean and rstd it was normalised with: the running ones, in float64."""
    if compiled(x) and mask is None:
        return torch.ops.batchnorm.infer(
            x, running_mean, running_var, weight, bias, residual, eps, activation.code, activation.slope
        )
    mean, rstd = running_mean.double(), torch.rsqrt(running_var.double() + eps)
    return normalize(x, Affine(mean, rstd, weight, bias), residual, mask, activation), mean, rstd


def track(
    running_mean: Tensor, running_var: Tensor, count: Tensor, mean: Tensor, m2: Tensor, momentum: float | Tensor
) -> None:
    """Nudge the running statistics towards the measured ones, in place: (1 - momentum) * running + momentum * measured.

    The variance tracked is the unbiased one. A channel with too few samples to have a statistic keeps what it had.
    """
    # The compiled operator knows nothing of low precision, nor of vmap, where these may be a batch of statistics.
    precise = running_mean.dtype == running_var.dtype and running_mean.dtype in (torch.float32, torch.float64)
    if compiled(running_mean) and precise and not isinstance(momentum, Tensor) and not under_transform():
        torch.ops.batchnorm.update_running_(running_mean, running_var, count, mean, m2, float(momentum))
        return
    plain.track(running_mean, running_var, count, mean, m2, momentum)


def backward(
    dy: Tensor,
    x: Tensor,
    affine: Affine,
    residual: Tensor | None,
    y: Tensor | None,
    mask: Tensor | None,
    activation: Activation,
    count: Tensor | None,
    need_dx: bool,
    need_dresidual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dresidual, and sum(dz), sum(dz * xhat), which are the gradients of bias and weight.

    `count` is how many values per channel the statistics were measured on; None where they were given.
    """
    if compiled(x) and mask is None:
        return torch.ops.batchnorm.backward(
            dy,
            x,
            *affine,
            residual,
            y,
            activation.code,
            activation.slope,
            count is not None,
            need_dx,
            need_dresidual,
        )
    return backward_plain(dy, x, affine, residual, y, mask, activation, count)


def backward_plain(
    dy: Tensor,
    x: Tensor,
    affine: Affine,
    residual: Tensor | None,
    y: Tensor | None,
    mask: Tensor | None,
    activation: Activation,
    count: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`backward` on plain operators, differentiable with respect to every tensor argument."""
    sums = plain.reduce(dy, x, affine, residual, y, mask, activation)
    means = None if count is None else (sums[0] / count.clamp(min=1), sums[1] / count.clamp(min=1))
    dx, dresidual = plain.apply(dy, x, affine, residual, y, mask, activation, means)
    return dx, dresidual, *sums
