"""Run a whole call by one operator forward and one backward, with as little overhead as torch's own, for small batches.

The operators check everything before they write anything, but their messages are terse. A call that is `Refused` here
has changed nothing, and takes the long path, which computes it in another way or raises a better message.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from ..activations import Activation
from . import autograd, choose, cpu, plain
from .plain import Settings

_is_grad_enabled = torch.is_grad_enabled
_is_dynamo_compiling = torch.compiler.is_dynamo_compiling
_get_tracing_state = torch._C._get_tracing_state
_transforms_active = torch._C._are_functorch_transforms_active
_increment_version = torch._C._increment_version
# Bypasses OpOverload.__call__, which only forwards: a Python frame costs as much as a pass over a small batch.
_forward, _backward, _infer = (
    getattr(torch.ops.batchnorm, name).default._op for name in ("forward_", "backward", "infer")
)

Moved = tuple[Tensor | None, Tensor | None, Tensor | None, float, bool, bool]
"""running_mean, running_var, batches; momentum, unbiased, skip_nonfinite: what a training call updates, and how."""

NOTHING: Moved = (None, None, None, 0.0, True, False)


class Refused(Exception):
    """One operator cannot serve the call; nothing has changed."""


def possible(x: object) -> bool:
    """Whether operators compute when they are called: nothing traces or transforms the call."""
    return (
        type(x) is Tensor
        and (
            cpu.COMPILED if x.is_cpu else choose.gpu_serves(x)
        )  # on any other device every call would raise, only to be caught
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
    """y, and the statistics of x; the running statistics have moved."""
    # In training, looking at x is usually enough.
    if _is_grad_enabled() and (x.requires_grad or _any_requires_grad(weight, bias, residual, moved[0], moved[1])):
        y = _apply_train(x, weight, bias, residual, mask, (eps, activation, moved))
        return y, y.grad_fn.statistics
    return _train(x, weight, bias, residual, mask, eps, activation, moved)


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
    others = (weight, bias, residual, running_mean, running_var)
    if _is_grad_enabled() and (x.requires_grad or _any_requires_grad(*others)):
        _check_saved(x, *others)
        return _apply_infer(x, weight, bias, residual, mask, running_mean, running_var, Settings(eps, activation))
    # Passing arguments that have defaults takes as long as a small layer's arithmetic.
    usual = (x, running_mean, running_var, weight, bias, eps, activation.code, activation.slope)
    try:
        return _infer(*usual)[0] if residual is None and mask is None else _infer(*usual, residual, mask)[0]
    except (RuntimeError, TypeError) as error:
        raise Refused from error


def _any_requires_grad(*tensors: Tensor | None) -> bool:
    # The operator itself refuses a residual that is not a tensor.
    return any(isinstance(each, Tensor) and each.requires_grad for each in tensors)


def _check_saved(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
) -> None:
    """Refuse early what autograd would refuse only after the operator has run."""
    if (
        x.is_inference()
        or (weight is not None and weight.is_inference())
        or (bias is not None and bias.is_inference())
        or (isinstance(residual, Tensor) and residual.is_inference())
        or (running_mean is not None and running_mean.requires_grad)
        or (running_var is not None and running_var.requires_grad)
    ):
        raise Refused


def _train(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    eps: float,
    activation: Activation,
    moved: Moved,
) -> tuple[Tensor, Tensor]:
    running_mean, running_var, batches, momentum, unbiased, skip_nonfinite = moved
    try:
        if running_mean is not None and running_var is not None:
            # Tell autograd that they change, for graphs that saved them for backward.
            _increment_version((running_mean, running_var) if batches is None else (running_mean, running_var, batches))
        if residual is None and mask is None and unbiased and not skip_nonfinite:
            return _forward(
                x, weight, bias, eps, running_mean, running_var, batches, momentum, activation.code, activation.slope
            )
        return _forward(
            x, weight, bias, eps, running_mean, running_var, batches, momentum, activation.code, activation.slope,
            residual, mask, unbiased, skip_nonfinite,
        )  # fmt: skip
    except (RuntimeError, TypeError) as error:
        raise Refused from error


class Train(Function):
    """`train`, as autograd sees it."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, weight, bias, residual, mask, (eps, activation, moved) = inputs
        _check_saved(x, weight, bias, residual, moved[0], moved[1])
        y, ctx.statistics = _train(x, weight, bias, residual, mask, eps, activation, moved)
        ctx.eps, ctx.activation = eps, activation
        if residual is None and mask is None:
            ctx.save_for_backward(x, weight, bias)
        else:
            kept = (None, None) if residual is None else autograd.kept_beside(residual, y, activation)
            ctx.save_for_backward(x, weight, bias, kept[0], mask, kept[1])
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        if _is_grad_enabled():
            ctx.settings, ctx.steps = Settings(ctx.eps, ctx.activation), plain
            return *autograd.gradients(ctx, grad_outputs[0], measured=True), None, None
        x, weight, bias, *others = ctx.saved_tensors
        activation = ctx.activation
        if not others and ctx.needs_input_grad[0]:
            dx, _, dweight, dbias = _backward(
                grad_outputs[0], x, ctx.statistics, weight, bias, ctx.eps, activation.code, activation.slope
            )
            return dx, dweight, dbias, None, None, None
        residual, mask, y = others or (None, None, None)
        need_dx, _, _, need_dresidual, *_ = ctx.needs_input_grad
        dx, dresidual, dweight, dbias = _backward(
            grad_outputs[0], x, ctx.statistics, weight, bias, ctx.eps, activation.code, activation.slope,
            residual, y, mask, 0, True, need_dx, need_dresidual,
        )  # fmt: skip
        return dx, dweight, dbias, dresidual, None, None


# Function.apply without its part for torch.func's transforms, under which these are never called.
_apply_train = super(Function, Train).apply  # pyright: ignore[reportAttributeAccessIssue]
_apply_infer = super(Function, autograd.Normalize).apply  # pyright: ignore[reportAttributeAccessIssue]
# And what the engine calls, without the check whether the class has backward or vjp.
Train._backward_cls.apply = Train.backward  # pyright: ignore[reportAttributeAccessIssue]
