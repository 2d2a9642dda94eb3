"""Adapter: what the tools need to know about a class of batch norms."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from ...mixin import is_parametrized, is_sharded


class Adapter(ABC):
    """How the batch norms of a class are read, converted and folded.

    Attributes:
        exact: whether eval mode computes gamma * (x - running_mean) / sqrt(running_var + eps) + beta and then `after`,
            nothing else. False for an unknown class.
        learns: whether it can measure, track and learn. A frozen look-alike cannot, not even in train mode.
    """

    exact: ClassVar[bool] = True
    learns: ClassVar[bool] = True

    @abstractmethod
    def matches(self, module: nn.Module) -> bool:
        """Whether the module is of this class."""

    def eps(self, layer: Any) -> float:
        """What is added to the variance."""
        return layer.eps

    def momentum(self, layer: Any) -> float | None:
        """Weight of the new value in the running statistics; None for a cumulative average, or if none are kept."""
        return layer.momentum

    def tracks(self, layer: Any) -> bool:
        """Whether there are running statistics."""
        return layer.running_mean is not None and layer.running_var is not None

    def channels(self, layer: Any) -> int:
        """C."""
        return layer.num_features

    def batches(self, layer: Any) -> Tensor | None:
        """How many batches were tracked; None if they are not counted."""
        return getattr(layer, "num_batches_tracked", None)

    def after(self, layer: Any) -> list[nn.Module]:
        """The modules that the layer itself runs on its normalized output, in order, without identities."""
        return []

    def forward(self, layer: Any) -> Callable[..., Tensor] | None:
        """The replacement of the class's own forward, with our normalization in it: f(layer, x, normalize, fused).

        `normalize(layer, x, activation=...)` is our layer's forward; `fused(module)` is the activation to pass to it
        instead of running the module, or None. Without a replacement the class's own forward runs, and reaches ours as
        `super().forward`. The replacement is a module-level function, because pickles refer to it by name.
        """
        return None

    def kept(self, layer: Any) -> str | None:
        """Why the layer cannot be converted; None if it can be."""
        return kept_as_is(layer)


class Lookalike(Adapter):
    """Base of the adapters of classes that are not torch.nn's, but have its four vectors by the same names."""

    learns = False

    def momentum(self, layer: Any) -> float | None:
        """None: nothing is tracked any more."""
        return None

    def channels(self, layer: Any) -> int:
        """C."""
        return layer.running_var.numel()


def drop_and_act(layer: nn.Module) -> list[nn.Module]:
    """What timm's classes run on the normalized output: drop and act, without identities."""
    parts = (layer._modules.get(name) for name in ("drop", "act"))
    return [part for part in parts if part is not None and type(part) is not nn.Identity]


def kept_as_is(layer: nn.Module) -> str | None:
    """Why the class or the forward of a layer cannot be changed, whatever its class; None if it can."""
    if is_lazy(layer):
        return "lazy: it has not seen an input yet"
    return class_of_torch(layer) or (
        "its forward was replaced on the layer itself" if "forward" in vars(layer) else None
    )


def class_of_torch(layer: nn.Module) -> str | None:
    """Which of torch's tools has changed the layer's class, so that it must not be changed again; None if none has."""
    if is_parametrized(layer):
        return "parametrized, which has changed its class: convert or revert before you parametrize it"
    return "sharded, which has changed its class: convert or revert before fully_shard" if is_sharded(layer) else None


def is_lazy(layer: nn.Module) -> bool:
    """Whether the layer waits for its first input to know its channels."""
    return isinstance(getattr(layer, "running_mean", None), torch.nn.UninitializedBuffer) or isinstance(
        layer, LazyModuleMixin
    )
