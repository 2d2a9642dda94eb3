"""Adapter: what has to be known of a class of batch norms, so that every tool can work on it."""

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
            nothing else. Of a class that nobody knows it cannot be told.
        learns: whether it can measure, track and learn: a frozen look-alike does not, in train mode either.
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
        """The share of the new in the running statistics; None for a cumulative average, or where none are kept."""
        return layer.momentum

    def tracks(self, layer: Any) -> bool:
        """Whether there are running statistics."""
        return layer.running_mean is not None and layer.running_var is not None

    def channels(self, layer: Any) -> int:
        """C."""
        return layer.num_features

    def batches(self, layer: Any) -> Tensor | None:
        """How many batches were tracked; None where nobody counts."""
        return getattr(layer, "num_batches_tracked", None)

    def after(self, layer: Any) -> list[nn.Module]:
        """The modules that the layer itself runs on what it has normalized, in their order, but for identities."""
        return []

    def forward(self, layer: Any) -> Callable[..., Tensor] | None:
        """What the class's own forward becomes when the normalization in it is ours: f(layer, x, normalize, fused).

        `normalize(layer, x, activation=...)` is our layer's forward; `fused(module)` is the activation to hand to it in
        the module's place, or None. Without a forward here the class's own is run, and reaches ours as
        `super().forward`. It is a function of a module, for pickles name it.
        """
        return None

    def kept(self, layer: Any) -> str | None:
        """Why the layer cannot be converted; None if it can be."""
        return kept_as_is(layer)


class Lookalike(Adapter):
    """Of classes that are no torch.nn batch norm, and have four vectors of its names."""

    learns = False

    def momentum(self, layer: Any) -> float | None:
        """None: nothing is tracked any more."""
        return None

    def channels(self, layer: Any) -> int:
        """C."""
        return layer.running_var.numel()


def drop_and_act(layer: nn.Module) -> list[nn.Module]:
    """What timm's classes run on the normalized: drop and act, without identities."""
    parts = (layer._modules.get(name) for name in ("drop", "act"))
    return [part for part in parts if part is not None and type(part) is not nn.Identity]


def kept_as_is(layer: nn.Module) -> str | None:
    """Why a layer of any class cannot be given another class, or another forward; None if it can."""
    if is_lazy(layer):
        return "lazy: it has not seen an input yet"
    return class_of_torch(layer) or ("has a forward of its own, set on the layer" if "forward" in vars(layer) else None)


def class_of_torch(layer: nn.Module) -> str | None:
    """Which of torch's tools gave the layer a class that nobody else may swap; None if none did."""
    if is_parametrized(layer):
        return "parametrized, which gave it a class of its own: convert or revert it before"
    return (
        "sharded, which gave it a class of its own: convert or revert before fully_shard" if is_sharded(layer) else None
    )


def is_lazy(layer: nn.Module) -> bool:
    """Whether the layer waits for its first input to know its channels."""
    return isinstance(getattr(layer, "running_mean", None), torch.nn.UninitializedBuffer) or isinstance(
        layer, LazyModuleMixin
    )
