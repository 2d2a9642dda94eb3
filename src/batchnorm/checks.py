"""The rules for the arguments of batch normalization, and the errors where they are broken."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .moments import broadcast_mask, broadcasts
from .ops.plain import Operands, Settings

_VECTORS = ("running_mean", "running_var", "weight", "bias")


def check(
    operands: Operands,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    settings: Settings,
    synchronized: bool = False,
    renormalized: bool = False,
) -> None:
    """Raise what torch raises for the same mistake, saying the rule, what was received, and the likely cure."""
    x, weight, bias, residual, mask = operands
    eps = settings.eps
    if not x.is_floating_point():
        raise NotImplementedError(
            f"batch_norm is defined for floating-point inputs, but got {x.dtype}; convert it first, as in x.float()"
        )
    if x.dim() < 2:
        raise IndexError(
            f"batch_norm expects an input of at least 2 dimensions, (N, C, *), but got {tuple(x.shape)}; "
            "add the batch dimension with x.unsqueeze(0)"
        )
    on_cpu, features, dtype = x.is_cpu, x.size(1), x.dtype
    for name, vector in zip(_VECTORS, (running_mean, running_var, weight, bias), strict=True):
        if vector is not None:
            _check_device(name, vector, x, on_cpu)
            if vector.dim() != 1 or vector.numel() != features:
                raise wrong_channels(name, tuple(vector.shape), x)
    for name, vector in (("running_mean", running_mean), ("running_var", running_var)):
        if vector is not None and not vector.is_floating_point():
            raise RuntimeError(f"{name} should be floating point, but got {vector.dtype}")
    low_precision = dtype in (torch.bfloat16, torch.float16)
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is not None and vector.dtype != dtype and not (low_precision and vector.dtype == torch.float32):
            raise RuntimeError(
                f"mixed dtype: {name} should be {dtype}{' or torch.float32' if low_precision else ''} beside an input "
                f"of {dtype}, but got {vector.dtype}; convert the layer or the input, or use autocast"
            )
    if torch.is_grad_enabled():
        for name, vector in (("running_mean", running_mean), ("running_var", running_var)):
            if vector is not None and vector.requires_grad:
                raise RuntimeError(
                    f"{name} tracks the batches and has no gradient, but requires grad; pass {name}.detach()"
                )
    if residual is not None:
        check_residual(residual, x)
        _check_device("residual", residual, x, on_cpu)
    if mask is not None:
        _check_device("mask", mask, x, on_cpu)
        broadcast_mask(mask, x)
    if (running_mean is None) != (running_var is None) or (not training and running_mean is None):
        name = "running_mean" if running_mean is None else "running_var"
        mode = "training (or neither running_mean nor running_var)" if training else "evaluation mode"
        raise RuntimeError(f"{name} must be defined in {mode}")
    if settings.virtual_batch and (synchronized or renormalized):
        other = "synchronized over ranks" if synchronized else "renormalized"
        raise ValueError(
            f"a virtual batch is measured by itself, on one rank, so it cannot be {other}: choose one of the two"
        )
    if training and mask is None and not synchronized and has_lonely_values(x, settings.virtual_batch):
        raise lonely_values(x, virtual_batch=settings.virtual_batch)
    if eps < 0.0 or (training and eps == 0.0):
        rule = "positive during training" if training else "non-negative"
        raise ValueError(f"batch_norm eps must be {rule}, but got {eps}")


def check_virtual_batch_size(size: int | None) -> None:
    """Raise a ValueError unless the size is a positive integer or None."""
    if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
        raise ValueError(
            f"virtual_batch_size must be a positive integer, or None for the whole batch, but got {size!r}"
        )


def check_residual(residual: object, x: Tensor) -> None:
    """Raise unless x + residual is defined, has x's shape, and can be given to an activation."""
    if not isinstance(residual, Tensor):
        raise TypeError(f"residual must be a tensor that is added to the input, but got {type(residual).__name__}")
    if residual.layout is not x.layout:
        raise RuntimeError(
            f"residual must have the input's layout, {x.layout}, but has {residual.layout}; convert one of them, as in "
            "residual.to_dense()"
        )
    if residual.is_complex() or residual.is_quantized:
        raise RuntimeError(
            f"residual must hold real numbers, as the input does, but got {residual.dtype}; convert it first"
        )
    if not broadcasts(residual.shape, x.shape):
        raise RuntimeError(
            f"residual must have the input's shape, {tuple(x.shape)}, or broadcast to it, but got "
            f"{tuple(residual.shape)}"
        )


def check_model(model: object) -> None:
    """Raise a TypeError unless it is a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be a torch.nn.Module, a whole model or a layer, but got {type(model).__name__}; "
            "pass several one at a time, or in a torch.nn.ModuleList"
        )


def _check_device(name: str, tensor: Tensor, x: Tensor, on_cpu: bool) -> None:
    # Comparing devices creates objects; is_cpu does not.
    if tensor.is_cpu is not on_cpu or not (on_cpu or tensor.device == x.device):
        raise RuntimeError(f"{name} should be on the input's device, {x.device}, but is on {tensor.device}")


def wrong_channels(name: str, shape: tuple[int, ...], x: Tensor, dim: int = 1) -> RuntimeError:
    """The error where the vector `name` does not have one element per channel of x; channels are in dimension `dim`."""
    elements, features = math.prod(shape), x.size(dim)
    elsewhere = [d for d in range(1, x.dim()) if d != dim and x.size(d) == elements]
    cure = "".join(f"; are they in dimension {d}? Then build the layer with channel_dim={d}" for d in elsewhere)
    return RuntimeError(
        f"{name} should contain {features} elements not {elements}, in one dimension: one per channel of "
        f"the input, whose dimension {dim} is {features} in {tuple(x.shape)}; got {shape}{cure}"
    )


class LonelyValues(ValueError):
    """One value per channel in training: it has no variance."""


class NonfiniteStatistics(RuntimeError):
    """A batch has NaN or infinite statistics, and nonfinite="raise" is set."""


def lonely_values(x: Tensor, layer: str | None = None, virtual_batch: int = 0) -> LonelyValues:
    """The error where a channel has a single value; `layer` is the layer's name in the model, if known."""
    where = f"{layer}: " if layer else ""
    cut, larger = "", "batch"
    if 0 < virtual_batch < x.size(0):
        cut, larger = f" in virtual batches of {virtual_batch}", "virtual_batch_size, a larger batch"
    return LonelyValues(
        f"{where}Expected more than 1 value per channel when training, got input size {x.size()}{cut}: one value is "
        f"its own mean, so every output would be the bias. Use a larger {larger}, drop_last=True in the DataLoader for "
        'a last batch of one, singleton="running" to normalize it with the running statistics, or eval mode for this '
        "layer"
    )


def lonely_block(layer: str) -> LonelyValues:
    """The error where a layer saw a single value per channel in a whole `accumulate` block."""
    return LonelyValues(
        f"{layer}: Expected more than 1 value per channel in an accumulate block, but it saw only one, which has no "
        "variance; nothing was tracked. Drop the remainder of the data, or build the layer with "
        'singleton="running"'
    )


def has_lonely_values(x: Tensor, virtual_batch: int) -> bool:
    """Whether a channel of x, or of one of its virtual batches, has one value alone."""
    items = min(
        x.size(0), virtual_batch or x.size(0)
    )  # of the smallest virtual batch: a remainder of one value joins the one before
    return x.size(1) > 0 and items * math.prod(x.shape[2:]) == 1
