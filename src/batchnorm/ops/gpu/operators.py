"""The operators of `schema.py` on Triton's kernels, of tensors that were checked."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..schema import STATISTICS, SUMS
from .launch import Walk, on, track
from .layout import format_of


def forward(
    x: Tensor, weight: Any, bias: Any, eps: float, act: int = 0, slope: float = 0.0, residual: Any = None,
    mask: Any = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y, and the statistics of x."""
    return forward_(x, weight, bias, eps, None, None, None, 0.0, act, slope, residual, mask)


def forward_(
    x: Tensor, weight: Any, bias: Any, eps: float, running_mean: Any, running_var: Any, batches: Any, momentum: float,
    act: int = 0, slope: float = 0.0, residual: Any = None, mask: Any = None, unbiased: bool = True,
    skip_nonfinite: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same, the running statistics moved, and the batch counted."""
    y, statistics = _like(x), _rows(x, STATISTICS)
    with on(x):
        walk = Walk(x, act, slope, residual, mask)
        moved = (running_mean, running_var, batches, momentum, unbiased, skip_nonfinite)
        walk.measure(statistics, eps, weight, bias, *moved)
        walk.normalize(y)
    return y, statistics


def infer(
    x: Tensor, running_mean: Tensor, running_var: Tensor, weight: Any, bias: Any, eps: float, act: int = 0,
    slope: float = 0.0, residual: Any = None, mask: Any = None, keep: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """y by the running statistics."""
    y, statistics = _like(x), _rows(x, STATISTICS) if keep else None
    with on(x):
        walk = Walk(x, act, slope, residual, mask)
        walk.use(statistics, eps, weight, bias, running=(running_mean, running_var))
        walk.normalize(y)
    return y, statistics


def measure(x: Tensor, mask: Any = None) -> Tensor:
    """The statistics of x."""
    statistics = _rows(x, STATISTICS)
    with on(x):
        Walk(x, 0, 0.0, None, mask).measure(statistics, 1.0, None, None)
    return statistics


def normalize(
    x: Tensor, statistics: Tensor, weight: Any, bias: Any, eps: float, act: int = 0, slope: float = 0.0,
    residual: Any = None, mask: Any = None,
) -> Tensor:  # fmt: skip
    """y by statistics that were measured before."""
    y = _like(x)
    with on(x):
        walk = Walk(x, act, slope, residual, mask)
        walk.use(statistics, eps, weight, bias)
        walk.normalize(y)
    return y


def reduce(
    dy: Tensor, x: Tensor, statistics: Tensor, weight: Any, bias: Any, eps: float, act: int = 0, slope: float = 0.0,
    residual: Any = None, y: Any = None, mask: Any = None,
) -> Tensor:  # fmt: skip
    """sum(dz) and sum(dz * xhat) of every channel."""
    sums = _rows(x, SUMS)
    with on(x):
        walk = Walk(x, act, slope, residual, mask, dy, y)
        walk.use(statistics, eps, weight, bias)
        walk.reduce(statistics, eps, sums, None, None)
    return sums


def apply(
    dy: Tensor, x: Tensor, statistics: Tensor, sums: Any, weight: Any, bias: Any, eps: float, act: int = 0,
    slope: float = 0.0, residual: Any = None, y: Any = None, mask: Any = None, need_dx: bool = True,
    need_dresidual: bool = False,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """dx and the residual's gradient, from those sums."""
    dx, dresidual = _like(x) if need_dx else None, _like(x) if need_dresidual else None
    if need_dx or need_dresidual:
        with on(x):
            walk = Walk(x, act, slope, residual, mask, dy, y)
            walk.use(statistics, eps, weight, bias, sums)
            walk.apply(dx, dresidual, measured=sums is not None)
    return dx, dresidual


def backward(
    dy: Tensor, x: Tensor, statistics: Tensor, weight: Any, bias: Any, eps: float, act: int = 0, slope: float = 0.0,
    residual: Any = None, y: Any = None, mask: Any = None, measured: bool = True, need_dx: bool = True,
    need_dresidual: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """dx, dresidual, dweight and dbias."""
    dx, dresidual = _like(x) if need_dx else None, _like(x) if need_dresidual else None
    dweight, dbias = _gradient_of(weight), _gradient_of(bias)
    with on(x):
        walk = Walk(x, act, slope, residual, mask, dy, y)
        walk.use(statistics, eps, weight, bias)
        if weight is not None or bias is not None or (measured and need_dx):
            walk.reduce(statistics, eps, None, dweight, dbias)
        if need_dx or need_dresidual:
            walk.apply(dx, dresidual, measured)
    return dx, dresidual, dweight, dbias


def update_running_(
    running_mean: Tensor, running_var: Tensor, statistics: Tensor, momentum: float, unbiased: bool = True,
    skip_nonfinite: bool = False,
) -> None:  # fmt: skip
    """The running statistics moved toward those."""
    with on(statistics):
        track(statistics, running_mean, running_var, momentum, unbiased, skip_nonfinite)


def _gradient_of(parameter: Any) -> Tensor | None:
    return None if parameter is None else torch.empty_like(parameter, memory_format=torch.contiguous_format)


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=format_of(x))


def _rows(x: Tensor, rows: int) -> Tensor:
    return x.new_empty((rows, x.size(1)), dtype=torch.float64)
