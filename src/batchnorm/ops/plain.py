"""The steps of batch normalization on plain PyTorch operators: any device, any dtype, differentiable in turn.

These serve where no compiled operator does, and they are what double backward differentiates. Statistics accumulate in
float64; element by element the arithmetic is float32 (float64 for float64), around the mean: x - mean is taken first,
with the mean as a pair of floats, so that the error does not grow with the mean.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..activations import Activation
from ..moments import broadcast_mask, per_channel


class Affine(NamedTuple):
    """What turns x into z = (x - mean) * rstd * weight + bias: (C,) vectors, mean and rstd float64."""

    mean: Tensor
    rstd: Tensor
    weight: Tensor | None
    bias: Tensor | None


def measure(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Count (int64, ()), mean and m2 (float64, (C,)) of each channel of x."""
    over = _all_but_channel(x)
    values = x
    if mask is None:
        count = torch.full((), x.numel() // max(x.size(1), 1), dtype=torch.int64, device=x.device)
    else:
        mask = broadcast_mask(mask, x)
        values = torch.where(mask, x, 0.0)
        count = mask.sum()
    mean = values.sum(over, dtype=torch.float64) / count.clamp(min=1)
    centred = _centre(values, mean)
    if mask is not None:
        centred = torch.where(mask, centred, 0.0)
    return count, mean, centred.square().sum(over, dtype=torch.float64)


def normalize(
    x: Tensor, affine: Affine, residual: Tensor | None, mask: Tensor | None, activation: Activation
) -> Tensor:
    """y = act((x - mean) * rstd * weight + bias + residual), 0 where the mask is False, in x's dtype."""
    if mask is not None:
        x, residual = _cleared(x, mask), None if residual is None else _cleared(residual, mask)
    y = activation(_pre_activation(x, affine, residual)).to(x.dtype)
    return y if mask is None else torch.where(broadcast_mask(mask, x), y, 0.0)


def reduce(
    dy: Tensor,
    x: Tensor,
    affine: Affine,
    residual: Tensor | None,
    y: Tensor | None,
    mask: Tensor | None,
    activation: Activation,
) -> tuple[Tensor, Tensor]:
    """sum(dz) and sum(dz * xhat) of each channel, float64, where dz = dy * act'(z)."""
    dz, xhat = _dz_and_xhat(dy, x, affine, residual, y, mask, activation)
    over = _all_but_channel(x)
    return dz.sum(over, dtype=torch.float64), (dz * xhat).sum(over, dtype=torch.float64)


def apply(
    dy: Tensor,
    x: Tensor,
    affine: Affine,
    residual: Tensor | None,
    y: Tensor | None,
    mask: Tensor | None,
    activation: Activation,
    means: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """dx = (dz - mean(dz) - xhat * mean(dz * xhat)) * weight * rstd, and dz, which is the residual's gradient.

    `means` are the two means, (C,) float64; None where the statistics were given, not measured, so that nothing flows
    through them.
    """
    dz, xhat = _dz_and_xhat(dy, x, affine, residual, y, mask, activation)
    shape = per_channel(x)
    dx = dz
    if means is not None:
        mean_dz, mean_dz_xhat = (m.to(dz.dtype).view(shape) for m in means)
        dx = dz - mean_dz - xhat * mean_dz_xhat
    dx = (dx * _scale(affine, dz.dtype).view(shape)).to(x.dtype)
    if mask is not None:
        dx = torch.where(broadcast_mask(mask, x), dx, 0.0)
    return dx, dz.to(x.dtype)


@torch.no_grad()
def track(
    running_mean: Tensor, running_var: Tensor, count: Tensor, mean: Tensor, m2: Tensor, momentum: float | Tensor
) -> None:
    """running = (1 - momentum) * running + momentum * measured, in place, in float64 before the one rounding."""
    unbiased = m2 / (count - 1).clamp(min=1)
    for running, measured, enough in ((running_mean, mean, count > 0), (running_var, unbiased, count > 1)):
        tracked = running.double()
        running.copy_(torch.where(enough, tracked + (measured - tracked) * momentum, tracked))


def _dz_and_xhat(
    dy: Tensor,
    x: Tensor,
    affine: Affine,
    residual: Tensor | None,
    y: Tensor | None,
    mask: Tensor | None,
    activation: Activation,
) -> tuple[Tensor, Tensor]:
    if mask is not None:
        dy, x = _cleared(dy, mask), _cleared(x, mask)
        residual, y = (None if t is None else _cleared(t, mask) for t in (residual, y))
    xhat = _centre(x, affine.mean) * affine.rstd.to(_accumulate_in(x)).view(per_channel(x))
    if y is not None:
        derivative = activation.derivative_from_output(y.to(xhat.dtype))
    else:
        derivative = activation.derivative(_pre_activation(x, affine, residual))
    dz = dy.to(xhat.dtype) * derivative
    if mask is not None:
        mask = broadcast_mask(mask, x)
        dz, xhat = torch.where(mask, dz, 0.0), torch.where(mask, xhat, 0.0)
    return dz, xhat


def _cleared(tensor: Tensor, mask: Tensor) -> Tensor:
    """The tensor with 0 under the mask, before any arithmetic: NaN * 0 is NaN, in a derivative too."""
    return torch.where(broadcast_mask(mask, tensor), tensor, 0.0)


def _pre_activation(x: Tensor, affine: Affine, residual: Tensor | None) -> Tensor:
    z = _centre(x, affine.mean)
    z = z * _scale(affine, z.dtype).view(per_channel(x))
    if affine.bias is not None:
        z = z + affine.bias.to(z.dtype).view(per_channel(x))
    return z if residual is None else z + residual.to(z.dtype)


def _scale(affine: Affine, dtype: torch.dtype) -> Tensor:
    return (affine.rstd if affine.weight is None else affine.rstd * affine.weight.double()).to(dtype)


def _centre(x: Tensor, mean: Tensor) -> Tensor:
    """x - mean, with a float64 mean and float32 arithmetic, exact to the last bit or so at any mean."""
    dtype = _accumulate_in(x)
    high = mean.to(dtype)
    low = (mean - high.double()).to(dtype)
    return (x.to(dtype) - high.view(per_channel(x))) - low.view(per_channel(x))


def _accumulate_in(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _all_but_channel(x: Tensor) -> list[int]:
    return [d for d in range(x.dim()) if d != 1]
