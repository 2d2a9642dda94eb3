"""Packages whose names are looked up on first use (PEP 562): importing one imports nothing that nobody asks for."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from types import ModuleType
from typing import Any


class _Face(ModuleType):
    """A package that is a face of names which live in other modules."""

    _home: Mapping[str, str]
    _rooms: Sequence[str]
    __all__: list[str]

    def __getattr__(self, name: str) -> object:
        if name in self._rooms:
            return import_module(f"{self.__name__}.{name}")
        if name not in self._home:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        value = late(self._home[name], name, self.__name__)
        self.__dict__[name] = value
        return value

    def __setattr__(self, name: str, value: object) -> None:
        # Importing a submodule binds it here. `batchnorm.watch` is a package, and a function: people mean the function.
        if not (name in self._home and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted([*self.__all__, *self._rooms])


def face(package: str, home: Mapping[str, str], rooms: Sequence[str] = ()) -> list[str]:
    """Make the package look these names up in their homes, modules relative to it; returns them, for `__all__`.

    rooms: subpackages that are attributes as well, without an import of theirs. Not for `__all__`: a star import should
    not replace what others call `nn`.
    """
    module = sys.modules[package]
    module.__dict__.update(_home=home, _rooms=rooms)
    module.__class__ = _Face
    return list(home)


def late(module: str, name: str, package: str | None = None) -> Any:
    """A name of a module that is imported only now: for the few that a room below needs of one above."""
    return getattr(import_module(module, package), name)
