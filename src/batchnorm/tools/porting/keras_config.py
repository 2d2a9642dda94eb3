"""The config of a BatchNormalization layer of Keras: which entries there are, what they mean for a layer of ours."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

_DEFAULTS: dict[str, Any] = {"axis": -1, "momentum": 0.99, "epsilon": 1e-3, "center": True, "scale": True}
_DEFAULTS |= {"synchronized": False, "trainable": True, "virtual_batch_size": None}
_DEFAULTS |= {"renorm": False, "renorm_clipping": None, "renorm_momentum": 0.99}
# What an optimizer or a loss makes of gamma and beta: nothing that the layer computes.
_OF_TRAINING = ("beta_regularizer", "gamma_regularizer", "beta_constraint", "gamma_constraint", "activity_regularizer")
# What says how the layer came about.
_OF_MAKING = ("name", "dtype", "autocast", "batch_input_shape", "batch_shape", "input_shape", "input_dim")
_OF_MAKING += tuple(f"{of}_initializer" for of in ("beta", "gamma", "moving_mean", "moving_variance"))
# What else it is called: by PyTorch, by our layers, by Flax.
_OTHER_NAMES = {"eps": "epsilon", "decay": "momentum", "channel_axis": "axis", "sync": "synchronized"}
_OTHER_NAMES |= {"bias": "center", "use_bias": "center", "use_scale": "scale", "affine": "center and scale"}


def complete(config: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The config, what is given in place of its entries, and Keras's defaults for the rest.

    Raises:
        TypeError: something given is no entry.
        ValueError: several axes of channels.
    """
    known = {*_DEFAULTS, *_OF_TRAINING, *_OF_MAKING}
    for name in given:
        if name not in known:
            cure = _OTHER_NAMES.get(name) or " or ".join(get_close_matches(name, _DEFAULTS, 1))
            meant = f"Keras calls it {cure}" if name in _OTHER_NAMES else f"is {cure} meant?" if cure else ""
            raise TypeError(f"from_keras() has no argument {name!r}; {meant or 'it has ' + ', '.join(_DEFAULTS)}")
    unknown = sorted(config.keys() - known)
    if unknown:
        _warn(f"config entries that Keras's BatchNormalization does not have are ignored: {', '.join(unknown)}")
    config = {**_DEFAULTS, **config, **given}
    left = [name for name in _OF_TRAINING if config.get(name) is not None]
    if left:
        _warn(f"ignored, because in PyTorch they do not belong to the layer: {', '.join(left)}")
    if config["virtual_batch_size"]:
        _warn(
            f"virtual_batch_size={config['virtual_batch_size']} is kept, but the running variance will follow "
            "that of the whole batch, and TensorFlow's follows the mean of the parts'; eval mode is the same"
        )
    return {**config, "axis": _one_axis(config["axis"])}


def _one_axis(axis: Any) -> int:
    axes = list(axis) if hasattr(axis, "__iter__") else [axis]  # older versions of Keras have a list of one
    if len(axes) != 1:
        raise ValueError(
            f"axis={axes}: the layer has a mean and variance for each pair of positions on these axes, and PyTorch's "
            "layers have one dimension of channels. Flatten these dimensions into one, around the layer"
        )
    return int(axes[0])


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=4)  # points at the call of from_keras
