"""How each class of batch norms is read, converted and folded: one small file a class, asked in this order.

To support a new class of batch norms, add a file here and a line in `ADAPTERS`; no tool changes. Nothing here imports
the library of that class, nor our layers: classes are recognized by their names and structure.
"""

from __future__ import annotations

from torch import nn

from .adapter import Adapter
from .frozen import Frozen
from .norm_act import NormAct
from .plain import Plain
from .subclass import Subclass

ADAPTERS: tuple[Adapter, ...] = (Plain(), NormAct(), Frozen(), Subclass())


def adapter_of(module: nn.Module) -> Adapter | None:
    """The adapter of the module's class; None if it is not a batch norm."""
    return next((adapter for adapter in ADAPTERS if adapter.matches(module)), None)


__all__ = ["ADAPTERS", "Adapter", "adapter_of"]
