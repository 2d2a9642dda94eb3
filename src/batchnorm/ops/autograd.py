"""How the steps differentiate: what is saved for backward, and the double backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..activations import Activation
from . import plain, steps
from .plain import Affine

_TENSORS = 5  # leading arguments of both functions: x, weight, bias, residual, mask


def normalize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    activation: Activation,
) -> Tensor:
    """y = act((x - mean) * rstd * weight + bias + residual) with the running statistics, as in eval."""
    if steps.under_transform():
        affine = Affine(running_mean.double(), torch.rsqrt(running_var.double() + eps), weight, bias)
        return plain.normalize(x, affine, residual, mask, activation)
    arguments = (x, weight, bias, residual, mask, running_mean, running_var, eps, activation)
    if _differentiates(arguments[:_TENSORS]):
        return Normalize.apply(*arguments)  # pyright: ignore[reportReturnType]
    return steps.infer(*arguments)[0]


def measure_and_normalize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    eps: float,
    activation: Activation,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same with the statistics of x itself, as in training: returns (y, count, mean, m2)."""
    if steps.under_transform():
        count, mean, m2 = plain.measure(x, mask)
        affine = Affine(mean, steps.rstd_of(count, m2, eps), weight, bias)
        return plain.normalize(x, affine, residual, mask, activation), count, mean.detach(), m2.detach()
    arguments = (x, weight, bias, residual, mask, eps, activation)
    if _differentiates(arguments[:_TENSORS]):
        return MeasureAndNormalize.apply(*arguments)  # pyright: ignore[reportReturnType]
    return steps.forward(*arguments)[:4]


def _differentiates(tensors: tuple[Tensor | None, ...]) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


class Normalize(torch.autograd.Function):
    """`normalize`, as autograd sees it."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        y, mean, rstd = steps.infer(*inputs)
        _keep(ctx, inputs, y, mean, rstd, None)
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        return *_gradients(ctx, grad_outputs[0], eps=None), None, None, None, None, None


class MeasureAndNormalize(torch.autograd.Function):
    """`measure_and_normalize`, as autograd sees it."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        y, count, mean, m2, rstd = steps.forward(*inputs)
        ctx.mark_non_differentiable(count, mean, m2)
        ctx.set_materialize_grads(False)
        ctx.eps = inputs[_TENSORS]
        _keep(ctx, inputs, y, mean, rstd, count)
        return y, count, mean, m2

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        if grad_outputs[0] is None:
            return (None,) * 7
        return *_gradients(ctx, grad_outputs[0], eps=ctx.eps), None, None, None


def _keep(ctx: Any, inputs: tuple[Any, ...], y: Tensor, mean: Tensor, rstd: Tensor, count: Tensor | None) -> None:
    """Keep x and (C,) vectors; beside a residual what the activation's derivative needs: y if that will do."""
    x, weight, bias, residual, mask = inputs[:_TENSORS]
    activation: Activation = inputs[-1]
    ctx.activation = activation
    ctx.has_residual = residual is not None
    by_output = residual is not None and activation.output_determines_derivative
    kept_y = y if by_output and activation.name != "none" else None
    kept_residual = None if by_output else residual
    ctx.save_for_backward(x, weight, bias, kept_residual, kept_y, mask, mean, rstd, count)


def _gradients(ctx: Any, dy: Tensor, eps: float | None) -> tuple[Tensor | None, ...]:
    """Gradients with respect to x, weight, bias, residual; eps is None where the statistics were given."""
    x, weight, bias, residual, y, mask, mean, rstd, count = ctx.saved_tensors
    need_dx, need_dweight, need_dbias, need_dresidual = ctx.needs_input_grad[:4]
    if torch.is_grad_enabled():
        # Somebody will differentiate this gradient, so it has to be a function of x in autograd's eyes, statistics
        # included. Plain operators are.
        if eps is not None:
            count, mean, m2 = plain.measure(x, mask)
            rstd = steps.rstd_of(count, m2, eps)
        dx, dresidual, dbias, dweight = steps.backward_plain(
            dy, x, Affine(mean, rstd, weight, bias), residual, y, mask, ctx.activation, count
        )
    else:
        dx, dresidual, dbias, dweight = steps.backward(
            dy,
            x,
            Affine(mean, rstd, weight, bias),
            residual,
            y,
            mask,
            ctx.activation,
            count,
            need_dx,
            need_dresidual and ctx.has_residual,
        )
    return (
        dx if need_dx else None,
        dweight.to(weight.dtype) if need_dweight else None,
        dbias.to(bias.dtype) if need_dbias else None,
        dresidual if need_dresidual else None,
    )
