"""The steps on our own operators; each device has its own kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from . import cpu, gpu, schema  # noqa: F401  (what is called has to be defined, and implemented)
from .plain import Operands, Settings

_operators = torch.ops.batchnorm


def measure(x: Tensor, mask: Tensor | None, size: int = 0) -> Tensor:
    """The statistics of x, (3, C); of virtual batches of `size` items (3, G, C)."""
    return _operators.measure.default(x, mask, size)


def normalize(operands: Operands, statistics: Tensor, settings: Settings) -> Tensor:
    """y = act((x - mean) * rstd * weight + bias + residual), 0 where the mask is False, in x's dtype."""
    x, weight, bias, residual, mask = operands
    eps, activation, virtual_batch = settings
    return _operators.normalize.default(
        x, statistics, weight, bias, eps, activation.code, activation.slope, residual, mask, virtual_batch
    )


def forward(operands: Operands, settings: Settings) -> tuple[Tensor, Tensor]:
    """y, and the statistics it was normalized with: those of x."""
    x, weight, bias, residual, mask = operands
    eps, activation, virtual_batch = settings
    return _operators.forward.default(
        x, weight, bias, eps, activation.code, activation.slope, residual, mask, virtual_batch
    )


def infer(
    operands: Operands, running_mean: Tensor, running_var: Tensor, settings: Settings, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """y, and, to be kept for backward, the running statistics it was normalized with."""
    x, weight, bias, residual, mask = operands
    eps, activation, _ = settings
    return _operators.infer.default(
        x, running_mean, running_var, weight, bias, eps, activation.code, activation.slope, residual, mask, keep
    )


def reduce(dy: Tensor, operands: Operands, y: Tensor | None, statistics: Tensor, settings: Settings) -> Tensor:
    """sum(dz) and sum(dz * xhat) of each channel, where dz = dy * act'(z): (2, C) or (2, G, C)."""
    x, weight, bias, residual, mask = operands
    eps, activation, virtual_batch = settings
    return _operators.reduce.default(
        dy, x, statistics, weight, bias, eps, activation.code, activation.slope, residual, y, mask, virtual_batch
    )


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
    """dx = (dz - mean(dz) - xhat * mean(dz * xhat)) * weight * rstd, and dz, which is the residual's gradient."""
    x, weight, bias, residual, mask = operands
    eps, activation, virtual_batch = settings
    return _operators.apply.default(
        dy, x, statistics, sums, weight, bias, eps, activation.code, activation.slope, residual, y, mask,
        virtual_batch, need_dx, need_dresidual,
    )  # fmt: skip


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
    """dx, dresidual, dweight and dbias; `measured`: the statistics are those of x, and gradients flow through them."""
    x, weight, bias, residual, mask = operands
    eps, activation, virtual_batch = settings
    return _operators.backward.default(
        dy, x, statistics, weight, bias, eps, activation.code, activation.slope, residual, y, mask, virtual_batch,
        measured, need_dx, need_dresidual,
    )  # fmt: skip


def track(
    running_mean: Tensor,
    running_var: Tensor,
    statistics: Tensor,
    momentum: float,
    unbiased: bool = True,
    skip_nonfinite: bool = False,
) -> None:
    """Nudge the running statistics toward the measured ones, in place: see `plain.track`."""
    if not torch.compiler.is_compiling():  # which tracks these writes itself
        torch._C._increment_version((running_mean, running_var))
    _operators.update_running_.default(running_mean, running_var, statistics, float(momentum), unbiased, skip_nonfinite)
