"""What the compiled operators return, for tracing: shapes, dtypes and memory formats without the numbers."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format


def register() -> None:
    """Register a fake for every operator of torch.ops.batchnorm; call once, after the library is loaded."""
    for fake in (forward, infer, measure, normalize, reduce, apply, backward, update_running_):
        torch.library.register_fake(f"batchnorm::{fake.__name__}", fake)


def forward(x: Tensor, weight, bias, residual, eps, act, slope) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _like(x), _channels(x), _channels(x), _channels(x)


def infer(
    x: Tensor, running_mean, running_var, weight, bias, residual, eps, act, slope
) -> tuple[Tensor, Tensor, Tensor]:
    return _like(x), _channels(x), _channels(x)


def measure(x: Tensor, mask) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty((), dtype=torch.int64), _channels(x), _channels(x)


def normalize(x: Tensor, mean, rstd, weight, bias, residual, mask, act, slope) -> Tensor:
    return _like(x)


def reduce(dy, x: Tensor, mean, rstd, weight, bias, residual, y, mask, act, slope) -> tuple[Tensor, Tensor]:
    return _channels(x), _channels(x)


def apply(
    dy,
    x: Tensor,
    mean,
    rstd,
    weight,
    bias,
    residual,
    y,
    mask,
    mean_dz,
    mean_dz_xhat,
    act,
    slope,
    need_dx,
    need_dresidual,
) -> tuple[Tensor, Tensor]:
    return _like(x, need_dx), _like(x, need_dresidual)


def backward(
    dy, x: Tensor, mean, rstd, weight, bias, residual, y, act, slope, training, need_dx, need_dresidual
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _like(x, need_dx), _like(x, need_dresidual), _channels(x), _channels(x)


def update_running_(running_mean, running_var, count, mean, m2, momentum) -> None:
    return None


def _like(x: Tensor, wanted: bool = True) -> Tensor:
    if not wanted:
        return x.new_empty((0,))
    return torch.empty_like(x, memory_format=suggest_memory_format(x))


def _channels(x: Tensor) -> Tensor:
    return x.new_empty((x.size(1),), dtype=torch.float64)
