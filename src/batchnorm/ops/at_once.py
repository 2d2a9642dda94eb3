"""A whole call by one operator of the CPU each way, with as little around it as torch's own has: for small batches.

Nothing is checked here. The operators check everything before they write anything, but have no good words.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from ..activations import Activation
from . import autograd, cpu, plain
from .plain import Settings

_is_grad_enabled = torch.is_grad_enabled
_is_dynamo_compiling = torch.compiler.is_dynamo_compiling
_get_tracing_state = torch._C._get_tracing_state
_transforms_active = torch._C._are_functorch_transforms_active
_increment_version = torch._C._increment_version
# Past OpOverload.__call__, which only passes on: a frame in Python costs as much as a pass over a small batch.
_forward, _backward, _infer = (
    getattr(torch.ops.batchnorm, name).default._op for name in ("forward_", "backward", "infer")
)

Moved = tuple[Tensor | None, Tensor | None, Tensor | None, float, bool, bool]
"""running_mean, running_var, batches; momentum, unbiased, skip_nonfinite: what a training call moves, and how."""

NOTHING: Moved = (None, None, None, 0.0, True, False)


def possible(x: object) -> bool:
    """Whether operators compute when they are called: nobody traces or transforms."""
    return (
        type(x) is Tensor
        and cpu.COMPILED
        and x.is_cpu  # elsewhere every call would raise, to be caught
        and not _is_dynamo_compiling()
        and _get_tracing_state() is None
        and not _transforms_active()
        and forward_ad._current_level < 0
    )


def train(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    eps: float,
    activation: Activation,
    moved: Moved,
) -> tuple[Tensor, Tensor]:
    """y, and the statistics of x; what is to be moved has moved."""
    running_mean, running_var, batches, momentum, unbiased, skip_nonfinite = moved
    if running_mean is not None and running_var is not None:
        if _is_grad_enabled() and (running_mean.requires_grad or running_var.requires_grad):
            raise RuntimeError("running statistics are not differentiated")
        # Who saved them for backward has to learn that they change.
        _increment_version((running_mean, running_var) if batches is None else (running_mean, running_var, batches))
    if _is_grad_enabled() and (
        x.requires_grad  # in training mostly enough
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    ):
        y = _apply_train(x, weight, bias, residual, mask, (eps, activation, moved))
        return y, y.grad_fn.statistics
    return _forward(
        x, weight, bias, eps, running_mean, running_var, batches, momentum, activation.code, activation.slope,
        residual, mask, unbiased, skip_nonfinite,
    )  # fmt: skip


def infer(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    eps: float,
    activation: Activation,
    running_mean: Tensor,
    running_var: Tensor,
) -> Tensor:
    """y by the running statistics."""
    if _is_grad_enabled() and (
        x.requires_grad
        or running_mean.requires_grad
        or running_var.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    ):
        if running_mean.requires_grad or running_var.requires_grad:
            raise RuntimeError("running statistics are not differentiated")
        settings = Settings(eps, activation)
        return _apply_infer(x, weight, bias, residual, mask, running_mean, running_var, settings)
    # What has a default takes as long to be passed as a small layer's arithmetic.
    if residual is None and mask is None:
        return _infer(x, running_mean, running_var, weight, bias, eps, activation.code, activation.slope)[0]
    return _infer(x, running_mean, running_var, weight, bias, eps, activation.code, activation.slope, residual, mask)[0]


class Train(Function):
    """`train`, as autograd sees it."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, weight, bias, residual, mask, (eps, activation, moved) = inputs
        running_mean, running_var, batches, momentum, unbiased, skip_nonfinite = moved
        ctx.eps, ctx.activation = eps, activation
        if residual is None and mask is None and unbiased and not skip_nonfinite:
            y, ctx.statistics = _forward(
                x, weight, bias, eps, running_mean, running_var, batches, momentum, activation.code, activation.slope
            )
            ctx.save_for_backward(x, weight, bias)
            return y
        y, ctx.statistics = _forward(
            x, weight, bias, eps, running_mean, running_var, batches, momentum, activation.code, activation.slope,
            residual, mask, unbiased, skip_nonfinite,
        )  # fmt: skip
        kept_residual, kept_y = (None, None) if residual is None else autograd.kept_beside(residual, y, activation)
        ctx.save_for_backward(x, weight, bias, kept_residual, mask, kept_y)
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        if _is_grad_enabled():
            ctx.settings, ctx.steps = Settings(ctx.eps, ctx.activation), plain
            return *autograd.gradients(ctx, grad_outputs[0], measured=True), None, None
        x, weight, bias, *others = ctx.saved_tensors
        activation, needed = ctx.activation, ctx.needs_input_grad
        usual = (grad_outputs[0], x, ctx.statistics, weight, bias, ctx.eps, activation.code, activation.slope)
        if not others and needed[0]:
            dx, _, dweight, dbias = _backward(*usual)
            return dx, dweight, dbias, None, None, None
        residual, mask, y = others or (None, None, None)
        dx, dresidual, dweight, dbias = _backward(*usual, residual, y, mask, 0, True, needed[0], needed[3])
        return dx, dweight, dbias, dresidual, None, None


# Function.apply but for what it does under a transform of torch.func, where these are never called.
_apply_train = super(Function, Train).apply  # pyright: ignore[reportAttributeAccessIssue]
_apply_infer = super(Function, autograd.Normalize).apply  # pyright: ignore[reportAttributeAccessIssue]
# And what the engine calls, but for the question whether it is backward or vjp that the class has.
Train._backward_cls.apply = Train.backward  # pyright: ignore[reportAttributeAccessIssue]
