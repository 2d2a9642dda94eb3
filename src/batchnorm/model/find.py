"""find(): every batch norm of a model, whatever its class, and what is known of that class."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ..mixin import original_class
from .adapters import Adapter, adapter_of

# Wrappers that appear in the names of the modules they wrap: torch.compile, FSDP1, checkpoint_wrapper.
_WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


class Found(NamedTuple):
    """One batch norm of a model.

    Attributes:
        name: as in the model without wrappers; empty for the model itself.
        layer: the module.
        adapter: what is known of its class.
    """

    name: str
    layer: Any
    adapter: Adapter

    @property
    def called(self) -> str:
        """The name, for a message."""
        return self.name or f"the {self.kind}"

    @property
    def kind(self) -> str:
        """The name of its class."""
        return original_class(self.layer).__name__


def bare(model: nn.Module, wrappers: Sequence[str] = _WRAPPED) -> nn.Module:
    """The model inside data parallelism and these wrappers; a wrapper is given by the name of its attribute."""
    while True:
        inside = [model._modules[name] for name in wrappers if model._modules.get(name) is not None]
        if isinstance(model, (DataParallel, DistributedDataParallel)):
            model = model.module
        elif inside:
            model = inside[0]  # pyright: ignore[reportAssignmentType]
        else:
            return model


def find(model: nn.Module) -> list[Found]:
    """Every batch norm of the model, each once, in the order of its modules.

    torch.nn's, ours, subclasses with whatever children, parametrized, lazy, prepared for quantization; in models that
    are compiled or wrapped; and frozen look-alikes that are no torch.nn batch norm.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU())
        >>> [(found.name, found.kind, found.adapter.learns) for found in find(model)]
        [('1', 'BatchNorm1d', True)]
    """
    named = bare(model).named_modules()
    return [Found(clean(name), m, adapter) for name, m in named if (adapter := adapter_of(m)) is not None]


def require(model: nn.Module, to: str) -> list[Found]:
    """`find`, for tools that need at least one batch norm.

    Raises:
        ValueError: there is no batch norm.
    """
    found = find(model)
    if not found:
        raise ValueError(_nothing_to(to, model))
    return found


def find_or_warn(model: nn.Module, to: str, *, stacklevel: int = 2) -> list[Found]:
    """`find`, for tools that do nothing without a batch norm: they warn, by default at their caller's line."""
    found = find(model)
    if not found:
        warnings.warn(_nothing_to(to, model), UserWarning, stacklevel=stacklevel + 1)
    return found


def _nothing_to(to: str, model: nn.Module) -> str:
    return f"the model has no batch norm to {to}; it has {classes_of(model)}"


def clean(name: str) -> str:
    """A module's name without the wrappers in it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPED)


def classes_of(model: nn.Module) -> str:
    """The classes in a model without a batch norm, for the message about it."""
    kinds = list(dict.fromkeys(type(m).__name__ for m in model.modules() if not any(m.children())))
    return ", ".join(kinds[:8]) + (f" and {len(kinds) - 8} more classes" if len(kinds) > 8 else "")
