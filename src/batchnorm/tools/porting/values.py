"""What a batch norm of any library has: four vectors and a few conventions; and a layer of ours made of them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from ...mixin import BatchNorm, option
from ...nn import BatchNorm1d, BatchNorm2d, BatchNorm3d
from ...nn.frozen import Frozen, freeze_layer
from ...nn.renorm import Renorm

Model = TypeVar("Model", bound=nn.Module)

_CLASSES = {2: BatchNorm1d, 3: BatchNorm1d, 4: BatchNorm2d, 5: BatchNorm3d}


@dataclass(frozen=True)
class Values:
    """A batch norm of Keras or Flax. Both track the biased variance, and both use "momentum" for the decay.

    Attributes:
        gamma, beta, mean, var: (C,); gamma and beta may be None.
        axis: where the channels are.
        decay: of the running statistics, 1 - PyTorch's momentum.
        trainable: False for a layer that always normalizes with its running statistics and learns nothing.
    """

    gamma: Any
    beta: Any
    mean: Any
    var: Any
    axis: int
    eps: float
    decay: float
    sync: bool = False
    trainable: bool = True
    renorm: Renorm | None = None
    virtual_batch_size: int | None = None

    def layer(self, ndim: int | None, channel_dim: int | None) -> BatchNorm1d | BatchNorm2d | BatchNorm3d:
        """A layer of ours that computes what the original does."""
        arrays = {name: array_of(name, getattr(self, name)) for name in ("gamma", "beta", "mean", "var")}
        for name in ("mean", "var"):
            if arrays[name] is None:
                raise ValueError(f"a batch norm needs running statistics, but {name} is missing")
        sizes = {name: array.shape for name, array in arrays.items() if array is not None}
        if len(set(sizes.values())) > 1 or any(len(shape) != 1 for shape in sizes.values()):
            raise ValueError(f"expected vectors with one value per channel, but got {sizes}")
        if ndim not in _CLASSES:
            raise ValueError(
                f"ndim must be the number of dimensions of the input, from 2 to 5, but got {ndim}: it says whether the "
                "layer is a BatchNorm1d, 2d or 3d, which the vectors do not show"
            )
        wide = any(array.dtype == torch.float64 for array in arrays.values() if array is not None)
        layer = _CLASSES[ndim](
            *sizes["mean"],
            eps=self.eps,
            decay=self.decay,
            dtype=torch.float64 if wide else torch.float32,
            center=self.beta is not None,
            scale=self.gamma is not None,
            unbiased=False,
            channel_dim=self.axis if channel_dim is None else channel_dim,
            sync=self.sync,
            renorm=self.renorm,
            virtual_batch_size=self.virtual_batch_size,
        )
        into = {"gamma": layer.weight, "beta": layer.bias, "mean": layer.running_mean, "var": layer.running_var}
        with torch.no_grad():
            for name, tensor in into.items():
                if tensor is not None:
                    tensor.copy_(arrays[name])
        if not self.trainable:
            freeze_layer(layer, stats=True, affine=True)
        return layer


def values_of(layer: BatchNorm, axis: int | None, library: str) -> Values:
    """The layer's values as NumPy arrays; warns about what the other library does differently in training."""
    if layer.running_mean is None or layer.running_var is None:
        raise ValueError(f"{library}'s layer has running statistics: build the layer with track_running_stats=True")
    if layer.momentum is None:
        raise ValueError(f"{library} has no cumulative average, momentum=None: set the layer's momentum to a number")
    activation = option(layer, "activation", None)
    if activation is not None and activation.name != "none":
        raise ValueError(
            f"{library}'s layer has no activation: apply {activation.name} after it, and build this without"
        )
    frozen = isinstance(layer, Frozen) and "stats" in layer.frozen
    differences = []
    if option(layer, "unbiased", True):
        differences.append("tracks the biased variance, this layer the unbiased")
    differences += [f"is without {name}" for name in ("renorm", "virtual_batch_size") if option(layer, name, None)]
    if differences and not frozen:
        warnings.warn(f"eval mode is the same, but in training {library} {', and '.join(differences)}", stacklevel=3)
    arrays = (layer.weight, layer.bias, layer.running_mean, layer.running_var)
    return Values(
        *(None if t is None else t.detach().cpu().numpy().copy() for t in arrays),
        axis=option(layer, "channel_dim", 1) if axis is None else axis,
        eps=layer.eps,
        decay=1.0 - layer.momentum,
        sync=option(layer, "sync", False),
        trainable=not frozen,
    )


def load(model: Model, sources: Mapping[str, BatchNorm]) -> Model:
    """Copy values and conventions of other layers into a model's batch norms, in place; returns the model.

    Values are gamma, beta and the running statistics. Conventions are eps, momentum, and whether the running variance
    is biased. The dimension of the channels stays as it is in the model.

    Args:
        model: with batch norms of ours: `convert` makes torch.nn's so.
        sources: for each layer's name in the model, the layer to copy from, for example from `from_keras`.

    Raises:
        AttributeError: the model has no module of that name.
        ValueError: a layer is not ours, or its number of channels differs, or only one of layer and source has gamma or
            beta. The model is then unchanged.

    Example:
        >>> model = bn.convert(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)))
        >>> arrays = {"gamma": [1, 2, 3], "beta": [0, 0, 1], "moving_mean": [5, 6, 7], "moving_variance": [1, 4, 9]}
        >>> bn.port.load(model, {"1": bn.port.from_keras(arrays, ndim=2)})[1].running_var.tolist(), model[1].eps
        ([1.0, 4.0, 9.0], 0.001)
    """
    layers: dict[str, Any] = {name: model.get_submodule(name) for name in sources}
    for name, source in sources.items():
        if not hasattr(layers[name], "unbiased"):
            raise ValueError(
                f"{name} is a {type(layers[name]).__name__}, not a batch norm of ours: convert(model) first"
            )
        shapes = [{k: tuple(v.shape) for k, v in layer.state_dict().items()} for layer in (layers[name], source)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"{name} has {shapes[0]}, but its source has {shapes[1]}")
    for name, source in sources.items():
        layers[name].load_state_dict(source.state_dict())
        for convention in ("eps", "momentum", "unbiased"):
            setattr(layers[name], convention, getattr(source, convention))
    return model


def array_of(name: str, value: Any) -> Tensor | None:
    """A vector of any library as a tensor, float64 if that is what it was, else float32."""
    if value is None:
        return None
    value = getattr(value, "value", value)  # of flax.nnx's variables
    wide = getattr(value, "dtype", None) in (torch.float64, np.float64)  # not a list's, which says nothing
    array = np.asarray(value.detach().cpu() if isinstance(value, Tensor) else value)
    if array.dtype.kind not in "fiu" and array.dtype.name != "bfloat16":
        raise ValueError(f"{name} should hold numbers, but has dtype {array.dtype}")
    return torch.from_numpy(array.astype(np.float64 if wide else np.float32))
