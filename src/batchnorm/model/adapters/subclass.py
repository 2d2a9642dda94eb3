"""Subclasses of torch.nn's batch norms: their forward may do anything, as long as it calls `super().forward`."""

from __future__ import annotations

import inspect
from types import FunctionType
from typing import Any

from torch import nn

from ...mixin import BatchNorm, original_class
from .adapter import Adapter, kept_as_is


class Subclass(Adapter):
    """Every other subclass of torch.nn's batch norms."""

    exact = False

    def matches(self, module: nn.Module) -> bool:
        """Any subclass that no other adapter matches."""
        return isinstance(module, BatchNorm)

    def kept(self, layer: Any) -> str | None:
        """Without a call of torch.nn's forward there is nothing that ours could replace."""
        cls = original_class(layer)
        if cls.__module__.startswith(("torch.ao.", "torch.nn.quantized", "torch.nn.intrinsic")):
            return "quantized"
        if not calls_super(cls):
            return "overrides forward without calling super().forward"
        return kept_as_is(layer)


def calls_super(cls: type[nn.Module]) -> bool:
    """Whether the forward of a subclass of torch.nn's layers calls theirs, which ours can then replace."""
    own = cls.__mro__[: cls.__mro__.index(BatchNorm)]
    forwards = [inspect.unwrap(vars(kind)["forward"]) for kind in own if "forward" in vars(kind)]
    return all(_has_super_forward(forward) for forward in forwards)


def _has_super_forward(forward: Any) -> bool:
    if not isinstance(forward, FunctionType):
        return False
    names = forward.__code__.co_names
    return "super" in names and "forward" in names
