"""batch_norm(): all of batch normalization in one function, which has no state of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from . import activations
from .activations import Activation
from .checks import check_virtual_batch_size
from .ops import at_once
from .ops.plain import Operands, Settings
from .pipeline import Running, Tracking, normalize_batch

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


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
    virtual_batch_size: int | None = None,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """Normalize each channel of the input, then scale, shift, add and activate, in one operation.

        y = activation(weight * (x - mean) / sqrt(var + eps) + bias + residual)

    In training, mean and var are *measured*: they are those of this batch, with the biased variance (divided by the
    count). The running statistics are then *tracked*: running = (1 - momentum) * running + momentum * measured, with
    the unbiased variance (divided by count - 1). In eval the running statistics are used instead, and nothing is
    updated. weight and bias, also called gamma and beta, are *learned*: this function only reads them, and an optimizer
    moves them by their gradients.

    The first eight arguments are those of torch.nn.functional.batch_norm. Derivatives of any order, forward mode and
    torch.func's transforms are supported.

    Args:
        input: x, (N, C, *), float32, float64, bfloat16 or float16, any memory format.
        running_mean, running_var: (C,), floating point, or None for neither. Updated in place in training.
        weight, bias: (C,), of x's dtype, or float32 beside a low-precision x; each may be None (1 and 0).
        training: measure the batch; else use the running statistics.
        momentum: weight of the new value in the running statistics, 0 to 1. (Keras's momentum is 1 minus this.)
        eps: added to the variance, so in units of x squared; positive in training.
        residual: added before the activation, as by +; fused where it has x's shape and dtype.
        activation: None, "relu", "relu6", "leaky_relu", "elu", "silu", "gelu", "hardswish", "sigmoid", "tanh", or the
            matching torch.nn module.
        mask: bool, broadcastable to x without its channels, (N, *): True counts. A value that is False is left out of
            the statistics, is 0 in y and has no gradient.
        virtual_batch_size: in training, the number of items that are measured and normalized together ("ghost
            batches"). The last virtual batch may be smaller; if it has a single value per channel, it joins the one
            before it. The running statistics move once, by the statistics of the whole batch.
        process_group: in training, measure over the batches of all its ranks. Every rank must make this call; ranks may
            have different numbers of samples, or none. None: this process alone.

    Returns:
        y: shape, dtype and memory format of x.

    Raises:
        ValueError: one value per channel in training; eps not positive in training; a mask that is not bool or does not
            broadcast; an unknown activation; a virtual_batch_size that is not positive, or is given with a process
            group.
        RuntimeError: vectors without C elements; dtypes that do not match; no running statistics in eval.
        NotImplementedError: x is not floating point.

    Source: Ioffe & Szegedy 2015, Algorithms 1 and 2.

    Example:
        >>> x = torch.tensor([[1.0], [3.0]])
        >>> batch_norm(x, weight=torch.tensor([10.0]), training=True, eps=1e-12).tolist()
        [[-10.0], [10.0]]
    """
    if virtual_batch_size is not None:
        check_virtual_batch_size(virtual_batch_size)
    act = activations.parse(activation)
    if virtual_batch_size is None and process_group is None and at_once.possible(input):
        try:
            if training:
                moved = (running_mean, running_var, None, momentum, True, False)
                return at_once.train(input, weight, bias, residual, mask, eps, act, moved)[0]
            if running_mean is not None and running_var is not None:
                return at_once.infer(input, weight, bias, residual, mask, eps, act, running_mean, running_var)
        except at_once.Refused:
            pass
    operands, running = Operands(input, weight, bias, residual, mask), Running(running_mean, running_var)
    settings, tracking = Settings(eps, act, virtual_batch_size or 0), Tracking(momentum) if training else None
    return normalize_batch(operands, running, settings, training, tracking, ranks=process_group)[0]
