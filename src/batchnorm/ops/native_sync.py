"""Synchronized batch normalization on torch's own operators for it, on devices that have them.

They measure and merge in one launch each; plain operators take some forty small launches per layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch.autograd import Function

from . import collective
from .native import Measured, finish, of_one_dtype, scratch, vectors_dtype
from .plain import Operands, Settings

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# The count of a rank without samples when torch merges. torch divides by the sum of the counts so far, so a first count
# of 0 gives 0/0. It keeps that sum as an integer, so this fraction adds nothing to it.
_NOTHING = 1e-30


class Rows(NamedTuple):
    """What each rank measured: means and rstds (R, C), counts (R,)."""

    means: Tensor
    rstds: Tensor
    counts: Tensor


def serves(x: Tensor) -> bool:
    """Whether x's device has the operators. A compiled graph does not use them: the compiler fuses plain operators."""
    if torch.compiler.is_compiling():
        return False
    key = torch._C._dispatch_key_for_device(x.device.type)
    return torch._C._dispatch_has_kernel_for_dispatch_key("aten::batch_norm_stats", key)


@torch.no_grad()
def measure(x: Tensor, eps: float, ranks: ProcessGroup) -> Rows:
    """What every rank measured: one all-gather. It does not look for empty ranks: that would wait for the device."""
    dtype, channels = vectors_dtype(x), x.size(1)
    if x.numel():
        mean, rstd = torch.batch_norm_stats(_laid_out(x), eps)
    else:
        mean, rstd = (torch.full((channels,), value, dtype=dtype, device=x.device) for value in (0.0, eps**-0.5))
    count = torch.full((1,), _count(x), dtype=dtype, device=x.device)
    mean, rstd, count = collective.gather(torch.cat((mean, rstd, count)), ranks).split((channels, channels, 1), 1)
    return Rows(mean, rstd, count.squeeze(1))


@torch.no_grad()
def merge(
    x: Tensor, rows: Rows, eps: float, running_mean: Tensor | None, running_var: Tensor | None, momentum: float
) -> Measured:
    """What all ranks measured together. Moves the running statistics, which torch `moves`, or None."""
    total, count = rows.counts.double().sum(), rows.counts.clamp(min=_NOTHING)
    if running_mean is None or running_var is None:
        moved = scratch(x)
    elif _count(x) > 1:
        moved = running_mean, running_var
    else:  # there may be no samples, or a single one without a variance: torch would write NaN
        moved = running_mean.clone(), running_var.clone()
    mean, rstd = torch.batch_norm_gather_stats_with_counts(x, rows.means, rows.rstds, *moved, momentum, eps, count)
    if running_mean is not None and running_var is not None and moved[0] is not running_mean:
        for running, now, enough in zip((running_mean, running_var), moved, (total > 0, total > 1), strict=True):
            running.copy_(torch.where(enough, now, running))
    return Measured(total, mean, rstd, eps)


def normalize(operands: Operands, rows: Rows, measured: Measured, settings: Settings, ranks: ProcessGroup) -> Tensor:
    """y by what all ranks measured."""
    x, weight, bias = of_one_dtype(operands)
    z = _Normalize.apply(_laid_out(x), weight, bias, measured, rows.counts.int(), ranks)
    return finish(z, operands, settings)  # pyright: ignore[reportArgumentType]


class _Normalize(Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, weight, bias, ctx.measured, ctx.counts, ctx.ranks = inputs
        ctx.save_for_backward(x, weight)
        if not x.numel():
            return torch.empty_like(x)
        return torch.batch_norm_elemt(x, weight, bias, ctx.measured.mean, ctx.measured.rstd, ctx.measured.eps)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            collective.refuse_more_derivatives(ctx.ranks)
        (x, weight), (_, mean, rstd, _) = ctx.saved_tensors, ctx.measured
        dy = grad_outputs[0].contiguous(memory_format=suggest_memory_format(x))
        if x.numel():
            dbias, along, _, _ = torch.batch_norm_backward_reduce(dy, x, mean, rstd, weight, True, False, False)
        else:
            dbias, along = torch.zeros_like(mean), torch.zeros_like(mean)
        dx, (need_dx, need_dweight, need_dbias, *_) = None, ctx.needs_input_grad
        # The other ranks wait for this rank's part, even if it needs nothing from them.
        total = collective.sum_over(torch.stack((dbias, along)), ctx.ranks)
        if need_dx:
            dx = torch.empty_like(x)
            if x.numel():
                dx = torch.batch_norm_backward_elemt(dy, x, mean, rstd, weight, total[0], total[1], ctx.counts)
        return dx, along * rstd if need_dweight else None, dbias if need_dbias else None, None, None, None


def _laid_out(x: Tensor) -> Tensor:
    """x in a layout that torch's operators read without copying: dense, channels first or last."""
    return x.contiguous(memory_format=suggest_memory_format(x))


def _count(x: Tensor) -> int:
    return x.numel() // max(x.size(1), 1)
