"""How the steps differentiate: what is saved for backward, and the double backward."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import collective, plain, steps
from .plain import Operands, Settings

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_TENSORS = len(Operands._fields)  # the leading arguments of all three functions


def normalize(operands: Operands, running_mean: Tensor, running_var: Tensor, settings: Settings) -> Tensor:
    """y = act((x - mean) * rstd * weight + bias + residual) with the running statistics, as in eval."""
    if steps.under_transform():
        return plain.normalize(operands, plain.given(running_mean, running_var, settings.eps), settings)
    if _differentiates(operands):
        return Normalize.apply(*operands, running_mean, running_var, settings)  # pyright: ignore[reportReturnType]
    return steps.infer(operands, running_mean, running_var, settings)[0]


def measure_and_normalize(operands: Operands, settings: Settings) -> tuple[Tensor, Tensor]:
    """The same with the statistics of x itself, as in training; returns them too."""
    if steps.under_transform():
        statistics = plain.measure(operands.x, operands.mask, settings)
        return plain.normalize(operands, statistics, settings), statistics.detach()
    if _differentiates(operands):
        return MeasureAndNormalize.apply(*operands, settings)  # pyright: ignore[reportReturnType]
    return steps.forward(operands, settings)


def normalize_measured(
    operands: Operands, statistics: Tensor, settings: Settings, ranks: ProcessGroup | None
) -> Tensor:
    """The same with statistics that `measure` gave before, of x alone or of all ranks' x."""
    if steps.under_transform():
        _refuse_more_derivatives(ranks)
        return plain.normalize(operands, plain.measure(operands.x, operands.mask, settings), settings)
    if _differentiates(operands):
        return NormalizeMeasured.apply(*operands, statistics, settings, ranks)  # pyright: ignore[reportReturnType]
    return steps.normalize(operands, statistics, settings)


def _differentiates(operands: Operands) -> bool:
    x, weight, bias, residual, _ = operands
    return torch.is_grad_enabled() and (
        x.requires_grad  # in training mostly enough
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    )


class Normalize(torch.autograd.Function):
    """`normalize`, as autograd sees it."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        *operands, running_mean, running_var, settings = inputs
        y, statistics = steps.infer(Operands(*operands), running_mean, running_var, settings)
        _keep(ctx, operands, y, statistics, settings)
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        return *_gradients(ctx, grad_outputs[0], measured=False), None, None, None, None


class MeasureAndNormalize(torch.autograd.Function):
    """`measure_and_normalize`, as autograd sees it."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        *operands, settings = inputs
        y, statistics = steps.forward(Operands(*operands), settings)
        ctx.mark_non_differentiable(statistics)
        ctx.set_materialize_grads(False)
        _keep(ctx, operands, y, statistics, settings)
        return y, statistics

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        if grad_outputs[0] is None:
            return (None,) * (_TENSORS + 1)
        return *_gradients(ctx, grad_outputs[0], measured=True), None, None


class NormalizeMeasured(torch.autograd.Function):
    """`normalize_measured`, as autograd sees it."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        *operands, statistics, settings, ranks = inputs
        ctx.ranks = ranks
        y = steps.normalize(Operands(*operands), statistics, settings)
        _keep(ctx, operands, y, statistics, settings)
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        return *_gradients(ctx, grad_outputs[0], measured=True, ranks=ctx.ranks), None, None, None, None


def _keep(ctx: Any, operands: list[Any], y: Tensor, statistics: Tensor, settings: Settings) -> None:
    """Keep x and channel vectors; beside a residual what the activation's derivative needs: y if that will do."""
    x, weight, bias, residual, mask = operands
    activation = settings.activation
    ctx.settings = settings
    by_output = residual is not None and activation.output_determines_derivative
    kept_y = y if by_output and activation.name != "none" else None
    kept_residual = None if by_output else residual
    ctx.save_for_backward(x, weight, bias, kept_residual, mask, kept_y, statistics)


def _gradients(ctx: Any, dy: Tensor, measured: bool, ranks: ProcessGroup | None = None) -> tuple[Tensor | None, ...]:
    """Gradients with respect to x, weight, bias, residual."""
    *operands, y, statistics = ctx.saved_tensors
    operands, settings = Operands(*operands), ctx.settings
    need_dx, need_dweight, need_dbias, need_dresidual = ctx.needs_input_grad[:4]
    if torch.is_grad_enabled():
        # Somebody will differentiate this gradient, so it has to be a function of x in autograd's eyes, statistics
        # included. Plain operators are.
        _refuse_more_derivatives(ranks)
        if measured:
            statistics = plain.measure(operands.x, operands.mask, settings)
        dx, dresidual, dweight, dbias = steps.backward_plain(dy, operands, y, statistics, settings, measured)
    elif ranks is None:
        dx, dresidual, dweight, dbias = steps.backward(
            dy, operands, y, statistics, settings, measured, need_dx, need_dresidual
        )
    else:
        sums = steps.reduce(dy, operands, y, statistics, settings)
        dweight, dbias = steps.parameter_gradients(sums, operands)
        total = collective.sum_over(sums, ranks)
        dx, dresidual = steps.apply(dy, operands, y, statistics, total, settings, need_dx, need_dresidual)
    return (
        dx if need_dx else None,
        dweight if need_dweight else None,
        dbias if need_dbias else None,
        dresidual if need_dresidual else None,
    )


def _refuse_more_derivatives(ranks: ProcessGroup | None) -> None:
    if ranks is not None:
        raise RuntimeError(
            "synchronized batch normalization has first derivatives by backward() alone: more would need the other "
            "ranks' part in them. Take them on one rank (without a process group) or in eval mode"
        )
