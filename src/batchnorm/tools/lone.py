"""A batch with one value per channel, pooled with others: it counts like any other, and the pool normalizes it.

One value is its own mean, and has no variance: normalized by itself, it would always give beta. The pool has a mean and
a variance, however the values are cut into batches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from ..mixin import option
from ..model.given import count_given
from ..moments import Moments
from ..ops.collective import several


def is_lone(layer: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether this call gives each channel one value; judged by its shape only, without waiting for a device.

    False for ranks that measure together: they have more values between them, or all of them raise.
    """
    x, dim = args[0], option(layer, "channel_dim", 1)
    fits = -x.dim() <= dim < x.dim() and x.shape[dim] == layer.num_features > 0
    if not fits or count_given(layer, args, kwargs) != 1:
        return False
    if isinstance(layer, nn.SyncBatchNorm) or option(layer, "sync", False):
        group = layer.process_group if isinstance(layer, nn.SyncBatchNorm) else option(layer, "process_group", None)
        return several(group) is None
    return True


def normalize_by(pool: Moments | None, layer: Any, forward: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """The layer's forward in eval mode, by the pool's mean and variance; with None, by the running ones.

    To autograd they are constants, as the running statistics are.
    """
    tracked = {name: layer._buffers[name] for name in ("running_mean", "running_var")}
    training = layer.training
    layer.training = False
    try:
        if pool is not None:
            mean, variance = pool.mean.detach(), pool.variance().detach()
            layer._buffers["running_mean"] = mean.to(tracked["running_mean"])
            layer._buffers["running_var"] = variance.to(tracked["running_var"])
        return forward(*args, **kwargs)
    finally:
        layer.training = training
        layer._buffers.update(tracked)
