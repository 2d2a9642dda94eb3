"""The fast path of a layer's call: one rank, one of our operators, no other options."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ..activations import Activation
from ..ops import at_once
from .options import Options
from .recompute import recomputing

if TYPE_CHECKING:
    from .layer import BatchNormLayer


def usual_call(
    layer: BatchNormLayer,
    x: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    activation: Activation,
    options: Options,
) -> Tensor | None:
    """y, as of `BatchNormLayer.forward`; None where the call is not the usual one, or was refused: nothing has moved.

    The options are `usual`. To check everything in Python takes as long as to normalize a small batch.
    """
    parameters, buffers, training = layer._parameters, layer._buffers, layer.training
    try:
        # Past Module.__getattr__, which takes as long for these five as the operator for a small batch.
        weight, bias = parameters["weight"], parameters["bias"]
        running_mean, running_var = buffers["running_mean"], buffers["running_var"]
        if training:
            momentum = layer.momentum
            if momentum is None or options.sync or recomputing():
                return None
            if layer.track_running_stats:
                batches, skip = buffers["num_batches_tracked"], options.nonfinite == "skip"
                moved = (running_mean, running_var, batches, momentum, options.unbiased, skip)
            else:
                moved = at_once.NOTHING
            y, statistics = at_once.train(
                x,
                weight,
                bias,
                residual,
                mask,
                layer.eps,
                activation,
                moved,  # pyright: ignore[reportArgumentType]
            )
            layer._batchnorm_remember(statistics, layer.track_running_stats)
            return y
        if running_mean is None or running_var is None:
            return None
        return at_once.infer(x, weight, bias, residual, mask, layer.eps, activation, running_mean, running_var)
    except (KeyError, at_once.Refused):  # a parametrized layer has no such parameter
        return None
