"""batch_norm(): the whole of batch normalization as one pure function, checked and documented."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import activations
from .activations import Activation
from .moments import Moments, broadcast_mask
from .ops import steps
from .ops.autograd import measure_and_normalize, normalize


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: str | nn.Module | type[nn.Module] | Activation | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Normalise each channel of the input, then scale, shift, add and activate, in one operation.

        y = activation(weight * (x - mean) / sqrt(var + eps) + bias + residual)

    In training, mean and var are *measured*: those of this batch, var the biased one (divided by the count). The
    running statistics are then *tracked*: running = (1 - momentum) * running + momentum * measured, var the unbiased
    one (divided by count - 1). In eval the running statistics are used in place of the measured and nothing is updated.
    weight and bias, gamma and beta, are *learned*: this function only reads them; their gradients are what moves them.

    The first eight arguments are those of torch.nn.functional.batch_norm. Derivatives of any order, forward mode and
    torch.func's transforms are supported.

    Args:
        input: x, (N, C, *), float32, float64, bfloat16 or float16, any memory format.
        running_mean, running_var: (C,), floating point, or None for neither. Updated in place in training.
        weight, bias: (C,), of x's dtype, or float32 beside a low-precision x; each may be None (1 and 0).
        training: measure the batch; else use the running statistics.
        momentum: how much of the new enters the running statistics, 0 to 1. (Keras's momentum is 1 minus this.)
        eps: added to the variance, so in units of x squared; positive in training.
        residual: added before the activation, as by +; fused where it has x's shape and dtype.
        activation: None, "relu", "relu6", "leaky_relu", "elu", "silu", "gelu", "hardswish", "sigmoid", "tanh", or the
            torch.nn module of it.
        mask: bool, broadcastable to x without its channels, (N, *): True counts. What is False takes no part in the
            statistics, is 0 in y and has no gradient.

    Returns:
        y: shape, dtype and memory format of x.

    Raises:
        ValueError: one value per channel in training; eps not positive in training; a mask that is not bool or does not
            broadcast; an unknown activation.
        RuntimeError: vectors without C elements; dtypes that do not go together; no running statistics in eval.
        NotImplementedError: x is not floating point.

    Source: Ioffe & Szegedy 2015, Algorithms 1 and 2.

    Example:
        >>> x = torch.tensor([[1.0], [3.0]])
        >>> batch_norm(x, weight=torch.tensor([10.0]), training=True, eps=1e-12).tolist()
        [[-10.0], [10.0]]
    """
    return batch_norm_with_moments(
        input,
        running_mean,
        running_var,
        weight,
        bias,
        training,
        momentum,
        eps,
        residual=residual,
        activation=activations.parse(activation),
        mask=mask,
    )[0]


def batch_norm_with_moments(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float | Tensor,
    eps: float,
    *,
    residual: Tensor | None = None,
    activation: Activation = activations.NONE,
    mask: Tensor | None = None,
) -> tuple[Tensor, Moments | None]:
    """`batch_norm`, and the Moments it measured: None where it measured nothing.

    Takes the momentum as a tensor too, so that a cumulative average needs no value from the device.
    """
    _check(input, running_mean, running_var, weight, bias, training, eps, residual, mask)
    if residual is not None and (residual.shape != input.shape or residual.dtype != input.dtype):
        torch.broadcast_shapes(residual.shape, input.shape)  # raises, before anything is tracked, what + would raise
        z, moments = batch_norm_with_moments(
            input, running_mean, running_var, weight, bias, training, momentum, eps, mask=mask
        )
        y = activation(z + residual)
        return (y if mask is None else torch.where(broadcast_mask(mask, input), y, 0.0)), moments
    if mask is None and not isinstance(momentum, Tensor) and _exports():
        z = _standard(input, running_mean, running_var, weight, bias, training, momentum, eps)
        return activation(z if residual is None else z + residual), None
    if not training:
        assert running_mean is not None
        assert running_var is not None
        return normalize(input, weight, bias, residual, mask, running_mean, running_var, eps, activation), None
    y, count, mean, m2 = measure_and_normalize(input, weight, bias, residual, mask, eps, activation)
    if running_mean is not None:
        assert running_var is not None
        steps.track(running_mean, running_var, count, mean, m2, momentum)
    return y, Moments(count, mean, m2)


def _exports() -> bool:
    """Whether the model is being written down for a program that has none of our operators."""
    tracing = torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
    return tracing or torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export()


def _standard(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    """The same by torch's own operator, which every exporter knows."""
    if not training and weight is not None and running_mean is not None and running_var is not None:
        # torch wants one dtype for all vectors
        running_mean, running_var = (
            t if t.dtype == weight.dtype else t.to(weight.dtype) for t in (running_mean, running_var)
        )
    return F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)


def _check(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    eps: float,
    residual: Tensor | None,
    mask: Tensor | None,
) -> None:
    if not x.is_floating_point():
        raise NotImplementedError(
            f"batch_norm is defined for floating-point inputs, but got {x.dtype}; convert it first, as in x.float()"
        )
    if x.dim() < 2:
        raise IndexError(
            f"batch_norm expects an input of at least 2 dimensions, (N, C, *), but got {tuple(x.shape)}; "
            "add the batch dimension with x.unsqueeze(0)"
        )
    vectors = {"running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias}
    for name, tensor in (*vectors.items(), ("residual", residual), ("mask", mask)):
        if tensor is not None and tensor.device != x.device:
            raise RuntimeError(f"{name} should be on the input's device, {x.device}, but is on {tensor.device}")
    features = x.size(1)
    for name, vector in vectors.items():
        if vector is not None and vector.numel() != features:
            raise RuntimeError(
                f"{name} should contain {features} elements not {vector.numel()}: one for each channel of the input, "
                f"whose dimension 1 is {features} in {tuple(x.shape)}"
            )
    low_precision = x.dtype in (torch.bfloat16, torch.float16)
    if running_mean is not None and not running_mean.is_floating_point():
        raise RuntimeError(f"running statistics should be floating point, but got {running_mean.dtype}")
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is not None and vector.dtype != x.dtype and not (low_precision and vector.dtype == torch.float32):
            raise RuntimeError(
                f"mixed dtype: {name} should be {x.dtype}{' or torch.float32' if low_precision else ''} beside an "
                f"input of {x.dtype}, but got {vector.dtype}; convert the layer or the input, or use autocast"
            )
    if mask is not None:
        broadcast_mask(mask, x)
    if (running_mean is None) != (running_var is None) or (not training and running_mean is None):
        name = "running_mean" if running_mean is None else "running_var"
        mode = "training (or neither running_mean nor running_var)" if training else "evaluation mode"
        raise RuntimeError(f"{name} must be defined in {mode}")
    if training and mask is None and x.numel() == features != 0:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {x.size()}: one value is its own "
            "mean, so every output would be the bias. Use a larger batch, drop_last=True in the DataLoader for a last "
            "batch of one, or eval mode for this layer"
        )
    if eps < 0.0 or (training and eps == 0.0):
        rule = "positive during training" if training else "non-negative"
        raise ValueError(f"batch_norm eps must be {rule}, but got {eps}")
