"""Batch norms from Flax and to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from ...mixin import BatchNorm
from ...nn import BatchNorm1d, BatchNorm2d, BatchNorm3d
from .values import Values, values_of


def from_flax(
    params: Mapping[str, Any],
    batch_stats: Mapping[str, Any] | None = None,
    *,
    ndim: int,
    axis: int = -1,
    momentum: float = 0.99,
    epsilon: float = 1e-5,
    channel_dim: int | None = None,
) -> BatchNorm1d | BatchNorm2d | BatchNorm3d:
    """Return a layer of ours that computes what flax.linen.BatchNorm or flax.nnx.BatchNorm does, also in training.

        running = momentum * running + (1 - momentum) * measured     with the biased variance

    Flax's momentum is our decay, 1 - PyTorch's momentum. Its running variance is divided by n, PyTorch's by n - 1. Its
    channels are last. Its use_fast_variance (the default there) computes E[x^2] - E[x]^2, which loses digits where a
    channel's mean is large beside its deviation: our layer computes what use_fast_variance=False gives.

    Args:
        params: the layer's own dict: "scale" and "bias", where it has them. Arrays of JAX, NumPy or PyTorch, or
            flax.nnx's variables.
        batch_stats: its "mean" and "var"; None where they are in `params` too, as in flax.nnx.
        ndim: dimensions of the input, batch and channels included, 2 to 5.
        axis, momentum, epsilon: as the Flax layer was built; the defaults are Flax's.
        channel_dim: the dimension of the channels, if it differs from Flax's: 1 for PyTorch's (N, C, H, W).

    Raises:
        ValueError: vectors that are missing, unknown or of different sizes.

    Example:
        >>> layer = from_flax({"scale": [1.0, 2.0], "bias": [0, 0]}, {"mean": [5.0, 6.0], "var": [1.0, 4.0]}, ndim=2)
        >>> type(layer).__name__, layer.eps, round(layer.momentum, 9), layer.unbiased, layer.channel_dim
        ('BatchNorm1d', 1e-05, 0.01, False, -1)
    """
    named = {**params, **(batch_stats or {})}
    unknown = set(named) - {"scale", "bias", "mean", "var"}
    if unknown:
        raise ValueError(f"expected scale, bias, mean and var of one layer, but got {', '.join(map(str, named))}")
    vectors = (named.get(name) for name in ("scale", "bias", "mean", "var"))
    return Values(*vectors, axis=axis, eps=epsilon, decay=momentum).layer(ndim, channel_dim)


class FlaxVariables(NamedTuple):
    """What a BatchNorm of Flax is made of.

    Attributes:
        params: its "scale" and "bias", where it has them, NumPy arrays.
        batch_stats: its "mean" and "var".
        attributes: the arguments of flax.linen.BatchNorm or flax.nnx.BatchNorm.
    """

    params: dict[str, Any]
    batch_stats: dict[str, Any]
    attributes: dict[str, Any]


def to_flax(layer: BatchNorm, *, axis: int | None = None) -> FlaxVariables:
    """Return the variables and arguments of a Flax layer that computes what this one does.

    Args:
        layer: a batch norm, torch.nn's or ours.
        axis: the channels' dimension in Flax, if it differs from the layer's: -1 for Flax's (N, H, W, C).

    Warns:
        UserWarning: Flax will differ in training, mainly because it tracks the biased variance.

    Raises:
        ValueError: the layer has an activation fused, no running statistics, or momentum=None.

    Example:
        >>> params, batch_stats, attributes = to_flax(bn.BatchNorm2d(2, unbiased=False), axis=-1)
        >>> params["scale"].tolist(), batch_stats["var"].tolist(), attributes["momentum"]
        ([1.0, 1.0], [1.0, 1.0], 0.9)
    """
    values = values_of(layer, axis, "Flax")
    learned = {"scale": values.gamma, "bias": values.beta}
    attributes = {
        "axis": values.axis,
        "momentum": values.decay,
        "epsilon": values.eps,
        "use_scale": values.gamma is not None,
        "use_bias": values.beta is not None,
        "use_fast_variance": False,
    }
    if not values.trainable:
        attributes["use_running_average"] = True
    params = {name: array for name, array in learned.items() if array is not None}
    return FlaxVariables(params, {"mean": values.mean, "var": values.var}, attributes)
