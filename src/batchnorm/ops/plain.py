"""The steps of batch normalization on plain PyTorch operators: any device, any dtype, differentiable in turn.

They are the fallback where no compiled operator serves, and what double backward differentiates. Statistics accumulate
in float64. Elementwise arithmetic is float32 (float64 for float64) and begins with x - mean, with the mean as a pair of
floats, so that the error does not grow with the mean.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..activations import Activation
from ..moments import broadcast_mask


class Operands(NamedTuple):
    """The tensors of a call: x (N, C, *), weight, bias (C,), residual as x, mask bool (N, *); all but x may be None."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    mask: Tensor | None


class Settings(NamedTuple):
    """The numbers of a call. virtual_batch: items that are measured together; 0: all of them."""

    eps: float
    activation: Activation
    virtual_batch: int = 0


@dataclass(frozen=True)
class Statistics:
    """The rows of what is measured: float64, (C,) each, or (G, C) for G virtual batches. One tensor holds all three."""

    count: Tensor
    mean: Tensor
    m2: Tensor

    def rstd(self, eps: float) -> Tensor:
        """1 / sqrt(variance + eps)."""
        return torch.rsqrt(self.m2 / self.count.clamp(min=1) + eps)


def statistics_of(count: Tensor, mean: Tensor, m2: Tensor) -> Tensor:
    """The (3, C) or (3, G, C) tensor of `Statistics`."""
    return torch.stack((count.double().expand_as(mean), mean, m2))


def given(running_mean: Tensor, running_var: Tensor) -> Tensor:
    """The same tensor for running statistics: a count of 0, as nothing was measured, and the variance in the row m2."""
    mean = running_mean.double()
    return torch.stack((torch.zeros_like(mean), mean, running_var.double()))


def measure(x: Tensor, mask: Tensor | None, size: int = 0) -> Tensor:
    """Statistics of each channel of x, (3, C); of virtual batches of `size` items (3, G, C)."""
    values, present = x, torch.ones((x.size(0), 1, *[1] * (x.dim() - 2)), dtype=torch.float64, device=x.device)
    if mask is None:
        present = present * (x.numel() // max(x.size(0) * x.size(1), 1))
    else:
        mask = broadcast_mask(mask, x)
        values, present = torch.where(mask, x, 0.0), mask
    count = _sum(present, x, size)
    mean = _sum(values, x, size) / count.clamp(min=1)
    centered = _center(values, mean, size)
    if mask is not None:
        centered = torch.where(mask, centered, 0.0)
    return statistics_of(count, mean, _sum(centered.square(), x, size))


def normalize(operands: Operands, statistics: Tensor, settings: Settings) -> Tensor:
    """y = act((x - mean) * rstd * weight + bias + residual), 0 where the mask is False, in x's dtype."""
    x, mask = operands.x, operands.mask
    y = settings.activation(_pre_activation(_cleared(operands), Statistics(*statistics), settings)).to(x.dtype)
    return y if mask is None else torch.where(broadcast_mask(mask, x), y, 0.0)


def forward(operands: Operands, settings: Settings) -> tuple[Tensor, Tensor]:
    """y, and the statistics it was normalized with: those of x."""
    statistics = measure(operands.x, operands.mask, settings.virtual_batch)
    return normalize(operands, statistics, settings), statistics


def infer(
    operands: Operands, running_mean: Tensor, running_var: Tensor, settings: Settings, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """y, and the statistics it was normalized with: the running ones."""
    statistics = given(running_mean, running_var)
    return normalize(operands, statistics, settings), statistics if keep else None


def reduce(dy: Tensor, operands: Operands, y: Tensor | None, statistics: Tensor, settings: Settings) -> Tensor:
    """sum(dz) and sum(dz * xhat) of each channel, (2, C) or (2, G, C) float64, where dz = dy * act'(z)."""
    return _sums(*_dz_and_xhat(dy, operands, y, Statistics(*statistics), settings), operands, settings)


def apply(
    dy: Tensor,
    operands: Operands,
    y: Tensor | None,
    statistics: Tensor,
    sums: Tensor | None,
    settings: Settings,
    need_dx: bool,
    need_dresidual: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """dx = (dz - mean(dz) - xhat * mean(dz * xhat)) * weight * rstd, and dz, which is the residual's gradient.

    The means are `sums` over the count. Without `sums` the statistics were given, not measured, and get no gradient.
    """
    measured = Statistics(*statistics)
    dz, xhat = _dz_and_xhat(dy, operands, y, measured, settings)
    return (
        _dx(dz, xhat, operands, measured, sums, settings) if need_dx else None,
        dz.to(operands.x.dtype) if need_dresidual else None,
    )


def backward(
    dy: Tensor,
    operands: Operands,
    y: Tensor | None,
    statistics: Tensor,
    settings: Settings,
    measured: bool,
    need_dx: bool,
    need_dresidual: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dx, dresidual, dweight and dbias, differentiable with respect to every tensor argument."""
    rows = Statistics(*statistics)
    dz, xhat = _dz_and_xhat(dy, operands, y, rows, settings)
    sums = _sums(dz, xhat, operands, settings)
    return (
        _dx(dz, xhat, operands, rows, sums if measured else None, settings) if need_dx else None,
        dz.to(operands.x.dtype) if need_dresidual else None,
        *parameter_gradients(sums, operands),
    )


def parameter_gradients(sums: Tensor, operands: Operands) -> tuple[Tensor | None, Tensor | None]:
    """dweight and dbias of the sums of `reduce`, in the parameters' dtypes."""
    dbias, dweight = sums.sum(1) if sums.dim() == 3 else sums
    weight, bias = operands.weight, operands.bias
    return (
        None if weight is None else dweight.to(weight.dtype),
        None if bias is None else dbias.to(bias.dtype),
    )


@torch.no_grad()
def track(
    running_mean: Tensor,
    running_var: Tensor,
    statistics: Tensor,
    momentum: float | Tensor,
    unbiased: bool,
    skip_nonfinite: bool,
) -> None:
    """running = (1 - momentum) * running + momentum * measured, in place, in float64 before the one rounding."""
    count, mean, m2 = statistics
    sound = mean.isfinite() & m2.isfinite() if skip_nonfinite else torch.ones_like(mean, dtype=torch.bool)
    missing = 1 if unbiased else 0
    variance = m2 / (count - missing).clamp(min=1)
    for running, measured, enough in ((running_mean, mean, count > 0), (running_var, variance, count > missing)):
        tracked = running.double()
        running.copy_(torch.where(enough & sound, tracked + (measured - tracked) * momentum, tracked))


def _sums(dz: Tensor, xhat: Tensor, operands: Operands, settings: Settings) -> Tensor:
    return torch.stack([_sum(terms, operands.x, settings.virtual_batch) for terms in (dz, dz * xhat)])


def _dx(
    dz: Tensor, xhat: Tensor, operands: Operands, measured: Statistics, sums: Tensor | None, settings: Settings
) -> Tensor:
    x, mask, size = operands.x, operands.mask, settings.virtual_batch
    dx = dz
    if sums is not None:
        mean_dz, mean_dz_xhat = (sums / measured.count.clamp(min=1)).to(dz.dtype)
        dx = dz - _spread(mean_dz, x, size) - xhat * _spread(mean_dz_xhat, x, size)
    dx = (dx * _spread(_scale(operands.weight, measured.rstd(settings.eps), dz.dtype), x, size)).to(x.dtype)
    return dx if mask is None else torch.where(broadcast_mask(mask, x), dx, 0.0)


def _dz_and_xhat(
    dy: Tensor, operands: Operands, y: Tensor | None, measured: Statistics, settings: Settings
) -> tuple[Tensor, Tensor]:
    mask = None if operands.mask is None else broadcast_mask(operands.mask, operands.x)
    operands = _cleared(operands)
    if mask is not None:
        dy, y = torch.where(mask, dy, 0.0), None if y is None else torch.where(mask, y, 0.0)
    x = operands.x
    xhat = _center(x, measured.mean, settings.virtual_batch)
    xhat = xhat * _spread(measured.rstd(settings.eps).to(xhat.dtype), x, settings.virtual_batch)
    if y is not None:
        derivative = settings.activation.derivative_from_output(y.to(xhat.dtype))
    else:
        derivative = settings.activation.derivative(_pre_activation(operands, measured, settings))
    dz = dy.to(xhat.dtype) * derivative
    if mask is not None:
        dz, xhat = torch.where(mask, dz, 0.0), torch.where(mask, xhat, 0.0)
    return dz, xhat


def _cleared(operands: Operands) -> Operands:
    """The operands with 0 under the mask, before any arithmetic: NaN * 0 is NaN, in a derivative too."""
    x, residual = operands.x, operands.residual
    if operands.mask is None:
        return operands
    mask = broadcast_mask(operands.mask, x)
    return operands._replace(
        x=torch.where(mask, x, 0.0), residual=None if residual is None else torch.where(mask, residual, 0.0)
    )


def _pre_activation(operands: Operands, measured: Statistics, settings: Settings) -> Tensor:
    x, size = operands.x, settings.virtual_batch
    z = _center(x, measured.mean, size)
    z = z * _spread(_scale(operands.weight, measured.rstd(settings.eps), z.dtype), x, size)
    if operands.bias is not None:
        z = z + _spread(operands.bias.to(z.dtype), x, size)
    return z if operands.residual is None else z + operands.residual.to(z.dtype)


def _scale(weight: Tensor | None, rstd: Tensor, dtype: torch.dtype) -> Tensor:
    return (rstd if weight is None else rstd * weight.double()).to(dtype)


def _center(x: Tensor, mean: Tensor, size: int) -> Tensor:
    """x - mean, with a float64 mean and float32 arithmetic, exact to the last bit or so at any mean."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    high = mean.to(dtype)
    low = (mean - high.double()).to(dtype)
    return (x.to(dtype) - _spread(high, x, size)) - _spread(low, x, size)


def virtual_batches(x: Tensor, size: int) -> int:
    """How many virtual batches of `size` items x is cut into. The last one holds the remainder, if any.

    A remainder of one value has no variance, so it joins the one before it.
    """
    joins = x.size(0) > size > 1 and x.size(0) % size == 1 and math.prod(x.shape[2:]) == 1
    return x.size(0) // size if joins else -(-x.size(0) // size)


def _sum(values: Tensor, x: Tensor, size: int) -> Tensor:
    """Sum over all but the channels, float64: (C,), or (G, C) over virtual batches of x."""
    if not size:
        return values.sum([d for d in range(values.dim()) if d != 1], dtype=torch.float64)
    items = values.flatten(2).sum(2, dtype=torch.float64) if values.dim() > 2 else values
    groups = virtual_batches(x, size)
    if groups <= 1:
        return items.sum(0, keepdim=True, dtype=torch.float64)[:groups]
    sums = F.pad(items, (0, 0, 0, -items.size(0) % size)).unflatten(0, (-1, size)).sum(1, dtype=torch.float64)
    return torch.cat((sums[: groups - 1], sums[groups - 1 :].sum(0, keepdim=True)))  # a remainder of one has joined


def _spread(channels: Tensor, x: Tensor, size: int) -> Tensor:
    """A (C,) vector, or the (G, C) of virtual batches, so that it broadcasts against x, (N, C, *)."""
    if channels.dim() == 1:
        return channels.view(1, -1, *[1] * (x.dim() - 2))
    if channels.size(0) <= 1:
        items = channels.expand(x.size(0), -1)
    else:
        items = torch.cat((channels.repeat_interleave(size, 0), channels[-1:]))[: x.size(0)]  # see _sum
    return items.view(*x.shape[:2], *[1] * (x.dim() - 2))
