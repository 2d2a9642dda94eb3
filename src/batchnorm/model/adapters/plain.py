"""torch.nn's own batch norms and ours, which do exactly what their class says."""

from __future__ import annotations

from typing import Any

from torch import nn

from ... import activations
from ...mixin import BatchNorm, option, original_class
from .adapter import Adapter


class Plain(Adapter):
    """torch.nn.BatchNorm1d, 2d, 3d and SyncBatchNorm, lazy and parametrized ones; and ours."""

    def matches(self, module: nn.Module) -> bool:
        """By the module that defines the class."""
        if not isinstance(module, BatchNorm):
            return False
        home = original_class(module).__module__
        return home == "torch.nn.modules.batchnorm" or home.split(".")[0] == __name__.split(".")[0]

    def after(self, layer: Any) -> list[nn.Module]:
        """The activation fused into a layer of ours."""
        activation = option(layer, "activation", activations.NONE)
        return [] if activation == activations.NONE else [activations.as_module(activation)]
