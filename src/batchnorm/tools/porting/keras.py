"""Batch norms from Keras and to it."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

from ...mixin import BatchNorm
from ...nn import BatchNorm1d, BatchNorm2d, BatchNorm3d
from ...nn.renorm import Renorm
from .keras_config import complete
from .keras_file import read
from .renorm import AVERAGES, renormalize_as_keras
from .values import Values, array_of, values_of

_ORDER = ("gamma", "beta", "moving_mean", "moving_variance")


def from_keras(
    layer: Any, *, ndim: int | None = None, channel_dim: int | None = None, **config: Any
) -> BatchNorm1d | BatchNorm2d | BatchNorm3d:
    """Return a layer of ours that computes what Keras's BatchNormalization does, in eval and step for step in training.

        running = momentum * running + (1 - momentum) * measured     with the biased variance

    Keras's momentum is our decay, 1 - PyTorch's momentum. Its running variance is divided by n, PyTorch's by n - 1. Its
    default eps is 1e-3, PyTorch's 1e-5. Its channels are last. The layer has all of these. A layer with trainable=False
    is frozen: see `freeze`.

    Args:
        layer: a BatchNormalization layer that has seen an input; or a dict with its "config" (from get_config()) and
            "weights" (from get_weights()); or a dict of the vectors gamma, beta, moving_mean and moving_variance (gamma
            and beta only if the layer has them). Names may start with a path and end with ":0".
        ndim: dimensions of the input, batch and channels included; a layer that has seen an input knows it.
        channel_dim: the dimension of the channels, if it differs from Keras's: 1 for PyTorch's (N, C, H, W).
        config: overrides the layer's config or, without one, Keras's defaults: axis, momentum, epsilon, center, scale,
            synchronized, trainable, renorm, renorm_clipping, renorm_momentum, or TensorFlow's virtual_batch_size.

    Warns:
        UserWarning: our layer will differ in training, though not in eval: the layer has a virtual_batch_size; or
            renorm=True, and the vectors lack the averages that Keras renormalizes with, or rmin is not 1 / rmax. Or the
            config has regularizers, constraints or unknown entries, which are ignored.

    Raises:
        ValueError: vectors that are missing, unknown or of different sizes; no ndim; several axes of channels.
        TypeError: `layer` is none of these; or an argument is not an entry of the config.

    Example:
        >>> arrays = {"gamma": [1.0, 2.0], "moving_mean": [5.0, 6.0], "moving_variance": [1.0, 4.0]}
        >>> layer = from_keras(arrays, ndim=4)
        >>> type(layer).__name__, layer.eps, round(layer.momentum, 9), layer.unbiased, layer.channel_dim, layer.beta
        ('BatchNorm2d', 0.001, 0.01, False, -1, None)
    """
    own: Mapping[str, Any]
    if isinstance(layer, Mapping):
        given = dict(layer)
        own = given.pop("config", {})
        weights = given.pop("weights", given)
    elif hasattr(layer, "get_config") and hasattr(layer, "get_weights"):
        own = layer.get_config()
        weights = layer.get_weights()
        ndim = ndim or getattr(getattr(layer, "input_spec", None), "ndim", None)
    else:
        raise TypeError(f"expected a Keras layer or a dict, but got {type(layer).__name__}")
    config = complete(own, config)
    named = _named(weights, config)
    result = Values(
        *(named.get(name) for name in _ORDER),
        axis=config["axis"],
        eps=config["epsilon"],
        decay=config["momentum"],
        sync=config["synchronized"],
        trainable=config["trainable"],
        renorm=_renorm(config, named),
        virtual_batch_size=config["virtual_batch_size"],
    ).layer(ndim, channel_dim)
    averages = {name: array_of(name, named.get(name)) for name in AVERAGES}
    found = {name: array for name, array in averages.items() if array is not None}
    if config["renorm"] and len(found) == len(AVERAGES):
        renormalize_as_keras(result, found, config["renorm_momentum"])
    return result


def from_keras_model(model: Any, **options: Any) -> dict[str, BatchNorm1d | BatchNorm2d | BatchNorm3d]:
    """Return every BatchNormalization layer of a Keras model as a layer of ours, by its path in the model.

    A file is read without Keras, and no code in it runs: its config is JSON, and its weights are HDF5.

    Args:
        model: a Keras model; or the path of a .keras, .h5 or .hdf5 file that its save() wrote, of Keras 2 or 3, which
            needs h5py (`pip install 'batchnorm[keras]'`).
        options: of `from_keras`, for all layers; `ndim` if the file does not tell it.

    Warns:
        UserWarning: there is none; or the file has vectors that look like batch norms in layers of a custom class.

    Raises:
        ModuleNotFoundError: a path, and h5py is not installed.
        ValueError: the file is not such a file, or lacks the weights of a layer.
    """
    if isinstance(model, (str, os.PathLike)):
        stored = read(model)
        found = {
            path: from_keras({"config": layer.config, "weights": layer.weights}, **{"ndim": layer.ndim, **options})
            for path, layer in stored.items()
        }
    else:
        found = {path: from_keras(layer, **options) for path, layer in _batch_norms(model, "")}
    if not found:
        warnings.warn("the model has no BatchNormalization layer", stacklevel=2)
    return found


class KerasLayer(NamedTuple):
    """What a BatchNormalization layer of Keras is made of.

    Attributes:
        config: the arguments of keras.layers.BatchNormalization.
        weights: what its set_weights() takes once it is built.
    """

    config: dict[str, Any]
    weights: list[Any]

    def layer(self, ndim: int) -> Any:
        """Build the layer for inputs with `ndim` dimensions; needs Keras."""
        import keras  # pyright: ignore[reportMissingImports]

        layer = keras.layers.BatchNormalization(**self.config)
        shape: list[int | None] = [None] * ndim
        shape[self.config["axis"]] = len(self.weights[-1])
        layer.build(tuple(shape))
        layer.set_weights(self.weights)
        return layer


def to_keras(layer: BatchNorm, *, axis: int | None = None) -> KerasLayer:
    """Return what makes a Keras layer that computes what this one does; `to_keras(layer).layer(ndim)` builds it.

    Args:
        layer: a batch norm, torch.nn's or ours.
        axis: the channels' dimension in Keras, if it differs from the layer's: -1 for Keras's (N, H, W, C).

    Warns:
        UserWarning: Keras will differ in training, mainly because it tracks the biased variance.

    Raises:
        ValueError: the layer has an activation fused, no running statistics, or momentum=None.

    Example:
        >>> config, weights = to_keras(bn.BatchNorm2d(3, unbiased=False), axis=-1)
        >>> config["momentum"], config["epsilon"], len(weights)
        (0.9, 1e-05, 4)
    """
    values = values_of(layer, axis, "Keras")
    config = {
        "axis": values.axis,
        "momentum": values.decay,
        "epsilon": values.eps,
        "center": values.beta is not None,
        "scale": values.gamma is not None,
        "synchronized": values.sync,
        "trainable": values.trainable,
    }
    return KerasLayer(config, [a for a in (values.gamma, values.beta, values.mean, values.var) if a is not None])


def _named(weights: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """The weights by name."""
    if not isinstance(weights, Mapping):
        absent = {name for name, has in (("gamma", "scale"), ("beta", "center")) if not config.get(has, True)}
        names = [name for name in _ORDER if name not in absent] + list(AVERAGES if config["renorm"] else ())
        if len(weights) != len(names):
            cure = "; call the layer on an input first" if not weights else ""
            raise ValueError(f"expected the weights {', '.join(names)}, but got {len(weights)} of them{cure}")
        return dict(zip(names, weights, strict=True))
    named = {str(name).removesuffix(":0").rpartition("/")[2]: array for name, array in weights.items()}
    unknown = set(named) - {*_ORDER, *AVERAGES}
    if unknown or len(named) < len(weights):
        raise ValueError(
            f"expected the vectors of one layer, {', '.join(_ORDER)}, but got {', '.join(map(str, weights))}"
        )
    return named


def _renorm(config: Mapping[str, Any], named: Mapping[str, Any]) -> Renorm | None:
    if not config["renorm"]:
        return None
    limits = {"rmax": math.inf, "rmin": 0.0, "dmax": math.inf}
    limits |= {name: limit for name, limit in (config["renorm_clipping"] or {}).items() if limit is not None}
    reciprocal = math.isclose(limits["rmin"], 1 / limits["rmax"], rel_tol=1e-6)
    if not (reciprocal and set(AVERAGES) <= set(named)):
        why = f"it has no {', '.join(AVERAGES)}" if reciprocal else "it clips r at 1 / rmax below, whatever rmin is"
        warnings.warn(f"this layer will differ from Keras's in training, but not in eval mode: {why}", stacklevel=3)
    return Renorm(limits["rmax"], limits["dmax"])


def _batch_norms(model: Any, prefix: str) -> list[tuple[str, Any]]:
    found = []
    for layer in model.layers:
        path = f"{prefix}{layer.name}"
        if type(layer).__name__ == "BatchNormalization":
            found.append((path, layer))
        if hasattr(layer, "layers"):
            found += _batch_norms(layer, f"{path}/")
    return found
