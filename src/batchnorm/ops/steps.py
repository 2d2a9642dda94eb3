"""Each step of the pipeline, by the compiled operator where there is one for the input, else on plain operators.

    forward:  measure -> merge -> normalize            backward:  reduce -> merge -> apply

`forward` and `backward` are the two halves with nothing to merge with, in one call, so that the second reading of x may
find it in cache. Statistics are one float64 tensor, (4, C), or (4, G, C) of G virtual batches: see `plain.Statistics`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import plain
from .load import COMPILED
from .plain import Operands, Settings

_COMPILED_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def compiled(x: Tensor) -> bool:
    """Whether the compiled operators serve this input."""
    return COMPILED and x.is_cpu and x.dtype in _COMPILED_DTYPES


def compiled_at_once(x: Tensor, *others: Tensor | None) -> bool:
    """Whether they are about to compute, with nobody tracing: they check all arguments before they write anything."""
    for other in others:
        if other is not None and not other.is_cpu:  # then another device's operators would be asked
            return False
    return (
        type(x) is Tensor  # a fake, say, has no values
        and compiled(x)
        and not torch.compiler.is_compiling()
        and torch._C._get_tracing_state() is None
        and not under_transform()
    )


def under_transform() -> bool:
    """Whether forward mode or a transform of torch.func is at work, eager or compiled.

    Then plain operators compute, for they compose with any transform: an autograd.Function has one backward, which
    forward mode cannot differentiate again, and a compiled operator has no derivative of its own.
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def measure(x: Tensor, mask: Tensor | None, settings: Settings) -> Tensor:
    """The statistics of x."""
    if compiled(x) and not under_transform():
        return torch.ops.batchnorm.measure.default(x, mask, settings.eps, settings.virtual_batch)
    return plain.measure(x, mask, settings)


def normalize(operands: Operands, statistics: Tensor, settings: Settings) -> Tensor:
    """y = act((x - mean) * rstd * weight + bias + residual), 0 where the mask is False, in x's dtype."""
    if compiled(operands.x):
        _, activation, virtual_batch = settings
        return torch.ops.batchnorm.normalize.default(
            operands.x, statistics, *operands[1:], activation.code, activation.slope, virtual_batch
        )
    return plain.normalize(operands, statistics, settings)


def forward(operands: Operands, settings: Settings) -> tuple[Tensor, Tensor]:
    """y, and the statistics it was normalised with: those of x."""
    if compiled(operands.x):
        eps, activation, virtual_batch = settings
        return torch.ops.batchnorm.forward.default(*operands, eps, activation.code, activation.slope, virtual_batch)
    statistics = plain.measure(operands.x, operands.mask, settings)
    return plain.normalize(operands, statistics, settings), statistics


def infer(operands: Operands, running_mean: Tensor, running_var: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    """y, and the statistics it was normalised with: the running ones."""
    if compiled(operands.x):
        eps, activation, _ = settings
        x, *others = operands
        return torch.ops.batchnorm.infer.default(
            x, running_mean, running_var, *others, eps, activation.code, activation.slope
        )
    statistics = plain.given(running_mean, running_var, settings.eps)
    return plain.normalize(operands, statistics, settings), statistics


def track(
    running_mean: Tensor,
    running_var: Tensor,
    statistics: Tensor,
    momentum: float | Tensor,
    unbiased: bool = True,
    skip_nonfinite: bool = False,
) -> None:
    """Nudge the running statistics towards the measured ones, in place: (1 - momentum) * running + momentum * measured.

    The variance tracked is m2 / (count - 1), or the biased one. A channel with too few samples to have a statistic
    keeps what it had; so does one that is not finite, if those are to be skipped.
    """
    # A momentum that is a tensor must not be read where somebody traces, and vmap may have made a batch of the running
    # statistics.
    if compiled(statistics) and not isinstance(momentum, Tensor) and not under_transform():
        torch.ops.batchnorm.update_running_.default(
            running_mean, running_var, statistics, float(momentum), unbiased, skip_nonfinite
        )
        return
    plain.track(running_mean, running_var, statistics, momentum, unbiased, skip_nonfinite)


def reduce(dy: Tensor, operands: Operands, y: Tensor | None, statistics: Tensor, settings: Settings) -> Tensor:
    """sum(dz) and sum(dz * xhat) of each channel, where dz = dy * act'(z): (2, C) or (2, G, C)."""
    if compiled(operands.x):
        x, weight, bias, residual, mask = operands
        _, activation, virtual_batch = settings
        return torch.ops.batchnorm.reduce.default(
            dy, x, statistics, weight, bias, residual, y, mask, activation.code, activation.slope, virtual_batch
        )
    return plain.reduce(dy, operands, y, statistics, settings)


def apply(
    dy: Tensor,
    operands: Operands,
    y: Tensor | None,
    statistics: Tensor,
    sums: Tensor | None,
    settings: Settings,
    need_dx: bool,
    need_dresidual: bool,
) -> tuple[Tensor, Tensor]:
    """dx = (dz - mean(dz) - xhat * mean(dz * xhat)) * weight * rstd, and dz, which is the residual's gradient."""
    if compiled(operands.x):
        x, weight, bias, residual, mask = operands
        _, activation, virtual_batch = settings
        return torch.ops.batchnorm.apply.default(
            dy, x, statistics, weight, bias, residual, y, mask, sums, activation.code, activation.slope, virtual_batch,
            need_dx, need_dresidual,
        )  # fmt: skip
    return plain.apply(dy, operands, y, statistics, sums, settings)


def backward(
    dy: Tensor,
    operands: Operands,
    y: Tensor | None,
    statistics: Tensor,
    settings: Settings,
    measured: bool,
    need_dx: bool,
    need_dresidual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dresidual, dweight and dbias; `measured`: the statistics are those of x, and gradients flow through them."""
    if compiled(operands.x):
        x, weight, bias, residual, mask = operands
        _, activation, virtual_batch = settings
        return torch.ops.batchnorm.backward.default(
            dy, x, statistics, weight, bias, residual, y, mask, activation.code, activation.slope, virtual_batch,
            measured, need_dx, need_dresidual,
        )  # fmt: skip
    return backward_plain(dy, operands, y, statistics, settings, measured)


def backward_plain(
    dy: Tensor, operands: Operands, y: Tensor | None, statistics: Tensor, settings: Settings, measured: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`backward` on plain operators, differentiable with respect to every tensor argument."""
    sums = plain.reduce(dy, operands, y, statistics, settings)
    dx, dresidual = plain.apply(dy, operands, y, statistics, sums if measured else None, settings)
    return dx, dresidual, *parameter_gradients(sums, operands)


def parameter_gradients(sums: Tensor, operands: Operands) -> tuple[Tensor, Tensor]:
    """dweight and dbias of the sums of `reduce`, in the parameters' dtypes."""
    dbias, dweight = sums.sum(1) if sums.dim() == 3 else sums
    return (
        dweight if operands.weight is None else dweight.to(operands.weight.dtype),
        dbias if operands.bias is None else dbias.to(operands.bias.dtype),
    )
