"""The fast path of a layer's call on torch's own operators: not on the CPU, one rank, only torch.nn's options.

With small batches a GPU waits for the host, so this path must have no more overhead than torch.nn's layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..activations import Activation
from ..ops import native
from ..ops.plain import Operands, Settings
from ..ops.schema import DTYPES
from .options import Options
from .recompute import recomputing

if TYPE_CHECKING:
    from .layer import BatchNormLayer


def usual_native_call(
    layer: BatchNormLayer, x: Tensor, residual: Tensor | None, activation: Activation, options: Options
) -> Tensor | None:
    """y, as of `BatchNormLayer.forward`; None where the call is not the usual one, or torch refused: nothing has moved.

    The options are `usual`, x is one that `choose.native_at_once` says yes to, and there is no mask.
    """
    parameters, buffers, dtype, vectors = layer._parameters, layer._buffers, x.dtype, native.vectors_dtype(x)
    try:
        weight, bias = parameters["weight"], parameters["bias"]
        running_mean, running_var = buffers["running_mean"], buffers["running_var"]
        batches = buffers["num_batches_tracked"]
    except KeyError:  # parametrized, say, or pruned
        return None
    if dtype not in DTYPES or x.numel() <= x.size(1):
        return None
    if running_mean is None or running_var is None or running_mean.dtype != vectors or layer.eps <= 0:
        return None
    if any(each is not None and each.dtype != vectors and each.dtype != dtype for each in (weight, bias)):
        return None
    if residual is not None and not _is_like(residual, x):
        return None
    operands, settings = Operands(x, weight, bias, residual, None), Settings(layer.eps, activation)
    try:
        if not layer.training:
            return native.infer(operands, running_mean, running_var, settings)
        momentum = layer.momentum
        if momentum is None or options.sync or not layer.track_running_stats or batches is None or recomputing():
            return None
        if options.nonfinite != "propagate" or not options.unbiased:
            return None
        z, measured = native.normalized(operands, settings, running_mean, running_var, momentum)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # the slow path raises with a better message
        return None
    batches.add_(1)
    layer._batchnorm_remember(measured, True)
    return native.finish(z, operands, settings)


def _is_like(residual: object, x: Tensor) -> bool:
    """Whether it can be added in place."""
    return type(residual) is Tensor and (residual.shape, residual.dtype, residual.device) == (
        x.shape,
        x.dtype,
        x.device,
    )
