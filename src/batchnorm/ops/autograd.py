"""How the steps differentiate: what is saved for backward, double backward, forward mode, and vmap."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..activations import Activation
from ..moments import per_channel
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
    learned = (x, weight, bias, residual, mask)
    if steps.under_transform():
        statistics = running_mean.double(), torch.rsqrt(running_var.double() + eps)
        return NormalizeTransformed.apply(*learned, *statistics, activation)  # pyright: ignore[reportReturnType]
    arguments = (*learned, running_mean, running_var, eps, activation)
    if _differentiates(learned):
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
    arguments = (x, weight, bias, residual, mask, eps, activation)
    if steps.under_transform():
        return MeasureAndNormalizeTransformed.apply(*arguments)  # pyright: ignore[reportReturnType]
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


class NormalizeTransformed(torch.autograd.Function):
    """`normalize`, as forward mode and torch.func see it, given mean and rstd."""

    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        x, weight, bias, residual, mask, mean, rstd, activation = inputs
        return steps.normalize(x, Affine(mean, rstd, weight, bias), residual, mask, activation)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *_, mean, rstd, _ = inputs
        _keep(ctx, inputs, output, mean, rstd, None)
        ctx.save_for_forward(*ctx.to_save)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        return *_gradients(ctx, grad_outputs[0], eps=None), None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return _tangent(ctx, tangents)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Tensor, int]:
        if in_dims[4] is not None:
            return _vmap_by_loop(NormalizeTransformed, info, in_dims, arguments)
        y = NormalizeTransformed.apply(*_fold(info.batch_size, in_dims, arguments))
        return _unfold(y, info.batch_size, 1), 1


class MeasureAndNormalize(torch.autograd.Function):
    """`measure_and_normalize`, as autograd sees it."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        y, count, mean, m2, rstd = steps.forward(*inputs)
        _keep_measured(ctx, inputs, (y, count, mean, m2), rstd)
        return y, count, mean, m2

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        if grad_outputs[0] is None:
            return (None,) * 7
        return *_gradients(ctx, grad_outputs[0], eps=ctx.eps), None, None, None


class MeasureAndNormalizeTransformed(torch.autograd.Function):
    """`measure_and_normalize`, as forward mode and torch.func see it."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return steps.forward(*inputs)[:4]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
        _, count, _, m2 = output
        _keep_measured(ctx, inputs, output, steps.rstd_of(count, m2, inputs[_TENSORS]))
        ctx.save_for_forward(*ctx.to_save)

    backward = MeasureAndNormalize.backward

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, None, None, None]:
        return _tangent(ctx, tangents), None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
        if in_dims[4] is not None:
            return _vmap_by_loop(MeasureAndNormalizeTransformed, info, in_dims, arguments)
        size = info.batch_size
        y, count, mean, m2 = MeasureAndNormalizeTransformed.apply(*_fold(size, in_dims, arguments))
        return (_unfold(y, size, 1), count, _unfold(mean, size, 0), _unfold(m2, size, 0)), (1, None, 0, 0)


def _keep_measured(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...], rstd: Tensor) -> None:
    y, count, mean, m2 = output
    ctx.mark_non_differentiable(count, mean, m2)
    ctx.set_materialize_grads(False)
    ctx.eps = inputs[_TENSORS]
    _keep(ctx, inputs, y, mean, rstd, count)


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


def _tangent(ctx: Any, tangents: tuple[Any, ...]) -> Tensor:
    """Forward mode: how y moves when x, weight, bias and residual move."""
    x, weight, bias, residual, y, mask, mean, rstd, count = ctx.saved_tensors
    dx, dweight, dbias, dresidual = tangents[:4]
    shape = per_channel(x)
    affine = Affine(mean, rstd, weight, bias)
    # xhat is the layer without gamma and beta; its own tangent is the projection that `apply` computes for dx.
    unit = Affine(mean, rstd, None, None)
    identity = Activation("none")
    dz = torch.zeros_like(x)
    if dx is not None:
        if count is None:
            means = None
        else:
            means = tuple(s / count.clamp(min=1) for s in plain.reduce(dx, x, unit, None, None, mask, identity))
        dz = plain.apply(dx, x, affine._replace(bias=None), None, None, mask, identity, means)[0]
    if dweight is not None:
        dz = dz + plain.normalize(x, unit, None, mask, identity) * dweight.to(x.dtype).view(shape)
    if dbias is not None:
        dz = dz + dbias.to(x.dtype).view(shape)
    if dresidual is not None:
        dz = dz + dresidual
    # d y = act'(z) dz is what `apply` returns as the residual's gradient.
    return plain.apply(dz, x, affine, residual, y, mask, ctx.activation, None)[1]


def _fold(size: int, in_dims: tuple[Any, ...], arguments: tuple[Any, ...]) -> list[Any]:
    """A batch of B normalizations of C channels is one normalization of B * C channels."""

    def fold(value: Any, dim: int | None, at: int) -> Any:
        if not isinstance(value, Tensor):
            return value
        value = (
            value.unsqueeze(at).expand(*value.shape[:at], size, *value.shape[at:])
            if dim is None
            else value.movedim(dim, at)
        )
        return value.flatten(at, at + 1)

    folded = []
    for i, (value, dim) in enumerate(zip(arguments, in_dims, strict=True)):
        if i == 4:  # the mask has no channels, so it serves all
            folded.append(value)
        else:
            folded.append(fold(value, dim, 1 if i in (0, 3) else 0))
    return folded


def _unfold(value: Tensor, size: int, at: int) -> Tensor:
    return value.unflatten(at, (size, -1))


def _vmap_by_loop(function: Any, info: Any, in_dims: tuple[Any, ...], arguments: tuple[Any, ...]) -> Any:
    """A mask for each: counts then differ between the normalizations, so they cannot share channels."""
    results = [
        function.apply(*(a if d is None else a.select(d, i) for a, d in zip(arguments, in_dims, strict=True)))
        for i in range(info.batch_size)
    ]
    if isinstance(results[0], Tensor):
        return torch.stack(results), 0
    return tuple(torch.stack(parts) for parts in zip(*results, strict=True)), (0,) * len(results[0])
