"""How the steps differentiate: what is saved for backward, and the double backward."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import Function

from ..activations import Activation
from . import choose, collective, plain
from .plain import Operands, Settings

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_TENSORS = len(Operands._fields)  # the leading arguments of all functions
_is_grad_enabled = torch.is_grad_enabled


def normalize(operands: Operands, running_mean: Tensor, running_var: Tensor, settings: Settings) -> Tensor:
    """y = act((x - mean) * rstd * weight + bias + residual) with the running statistics, as in eval."""
    if choose.composes(operands.x):
        return plain.infer(operands, running_mean, running_var, settings, keep=False)[0]
    if _differentiates(*operands):
        return Normalize.apply(*operands, running_mean, running_var, settings)  # pyright: ignore[reportReturnType]
    return choose.steps(operands.x, settings.virtual_batch).infer(
        operands, running_mean, running_var, settings, keep=False
    )[0]


def measure_and_normalize(operands: Operands, settings: Settings) -> tuple[Tensor, Tensor]:
    """The same with the statistics of x itself, as in training; returns them too."""
    if choose.composes(operands.x):
        y, statistics = plain.forward(operands, settings)
        return y, statistics.detach()
    if _differentiates(*operands):
        return MeasureAndNormalize.apply(*operands, settings)  # pyright: ignore[reportReturnType]
    return choose.steps(operands.x, settings.virtual_batch).forward(operands, settings)


def normalize_measured(
    operands: Operands, statistics: Tensor, settings: Settings, ranks: ProcessGroup | None
) -> Tensor:
    """The same with statistics that `measure` gave before, of x alone or of all ranks' x."""
    if choose.composes(operands.x):
        collective.refuse_more_derivatives(ranks)
        return plain.normalize(operands, plain.measure(operands.x, operands.mask, settings.virtual_batch), settings)
    if _differentiates(*operands):
        return NormalizeMeasured.apply(*operands, statistics, settings, ranks)  # pyright: ignore[reportReturnType]
    return choose.steps(operands.x, settings.virtual_batch).normalize(operands, statistics, settings)


def _differentiates(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, mask: Tensor | None = None
) -> bool:
    return _is_grad_enabled() and (
        x.requires_grad  # in training mostly enough
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    )


class Normalize(Function):
    """`normalize`, as autograd sees it."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        *operands, running_mean, running_var, settings = inputs
        ctx.steps = choose.steps(operands[0], settings.virtual_batch)
        y, statistics = ctx.steps.infer(Operands(*operands), running_mean, running_var, settings, keep=True)
        _keep(ctx, operands, y, statistics, settings)
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        return *gradients(ctx, grad_outputs[0], measured=False), None, None, None, None


class MeasureAndNormalize(Function):
    """`measure_and_normalize`, as autograd sees it."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        *operands, settings = inputs
        ctx.steps = choose.steps(operands[0], settings.virtual_batch)
        y, statistics = ctx.steps.forward(Operands(*operands), settings)
        ctx.mark_non_differentiable(statistics)
        ctx.set_materialize_grads(False)
        _keep(ctx, operands, y, statistics, settings)
        return y, statistics

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        if grad_outputs[0] is None:
            return (None,) * (_TENSORS + 1)
        return *gradients(ctx, grad_outputs[0], measured=True), None, None


class NormalizeMeasured(Function):
    """`normalize_measured`, as autograd sees it."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        *operands, statistics, settings, ranks = inputs
        ctx.ranks = ranks
        ctx.steps = choose.steps(operands[0], settings.virtual_batch)
        y = ctx.steps.normalize(Operands(*operands), statistics, settings)
        _keep(ctx, operands, y, statistics, settings)
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        return *gradients(ctx, grad_outputs[0], measured=True, ranks=ctx.ranks), None, None, None, None


def _keep(ctx: Any, operands: Any, y: Tensor, statistics: Tensor | None, settings: Settings) -> None:
    """Save what backward needs."""
    x, weight, bias, residual, mask = operands
    kept_residual, kept_y = (None, None) if residual is None else kept_beside(residual, y, settings.activation)
    ctx.settings = settings
    # Kept outside of save_for_backward, because hooks may return saved tensors in half precision. Tracers save all of
    # it.
    ctx.statistics = None if torch.compiler.is_compiling() else statistics
    traced = (statistics,) if torch.compiler.is_compiling() else ()
    ctx.save_for_backward(x, weight, bias, kept_residual, mask, kept_y, *traced)


def kept_beside(residual: Tensor, y: Tensor, activation: Activation) -> tuple[Tensor | None, Tensor | None]:
    """For a call with a residual: the residual or y, whichever the activation's derivative needs."""
    if not activation.output_determines_derivative:
        return residual, None
    return None, None if activation.name == "none" else y


def gradients(ctx: Any, dy: Tensor, measured: bool, ranks: ProcessGroup | None = None) -> tuple[Tensor | None, ...]:
    """Gradients with respect to x, weight, bias, residual."""
    saved = ctx.saved_tensors
    x, weight, bias, residual, mask, y, *traced = saved if len(saved) > 3 else (*saved, None, None, None)
    operands, settings = Operands(x, weight, bias, residual, mask), ctx.settings
    statistics: Any = traced[0] if traced else ctx.statistics
    need_dx, need_dweight, need_dbias, need_dresidual = ctx.needs_input_grad[:4]
    if _is_grad_enabled():
        # This gradient will be differentiated again, so autograd must see it as a function of x, statistics included.
        # Plain operators give that.
        collective.refuse_more_derivatives(ranks)
        if measured:
            statistics = plain.measure(operands.x, operands.mask, settings.virtual_batch)
        gradients = plain.backward(dy, operands, y, statistics, settings, measured, need_dx, need_dresidual)
    elif ranks is None:
        gradients = ctx.steps.backward(dy, operands, y, statistics, settings, measured, need_dx, need_dresidual)
    else:
        sums = ctx.steps.reduce(dy, operands, y, statistics, settings)
        total = collective.sum_over(sums, ranks)
        gradients = (
            *ctx.steps.apply(dy, operands, y, statistics, total, settings, need_dx, need_dresidual),
            *plain.parameter_gradients(sums, operands),
        )
    dx, dresidual, dweight, dbias = gradients
    return dx, dweight if need_dweight else None, dbias if need_dbias else None, dresidual
