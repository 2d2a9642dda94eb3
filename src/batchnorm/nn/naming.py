"""Names of layers and modules, for messages."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable
from types import FrameType

import torch
from torch import nn


def name_of(layer: nn.Module) -> str | None:
    """The layer's name in the outermost module whose forward is running; None where there is none.

    A layer does not know its name; the modules that are calling it do.
    Looks through the frames of the call stack, so it is for the way out, where an error is raised.
    """
    if torch.compiler.is_compiling():
        return None
    name, frame = None, sys._getframe(1)
    while frame is not None:
        module = _self_of(frame)
        if isinstance(module, nn.Module) and module is not layer:
            name = next((path for path, child in module.named_modules() if child is layer), name)
        frame = frame.f_back
    return name


def _self_of(frame: FrameType) -> object:
    """`self` in the frame of a method."""
    code = frame.f_code
    if code.co_varnames[:1] != ("self",) or not code.co_flags & inspect.CO_OPTIMIZED:
        return None
    values = frame.f_locals
    module = values.get("self")
    if type(values) is dict:  # up to Python 3.12 a copy, which the frame would keep: an input would live on in it
        values.clear()
    return module


def lines_of(groups: Iterable[tuple[str, list[str], str]]) -> list[str]:
    """A line for each class, the names of its modules, and what is said of them: how many, and one of them by name."""
    lines = []
    for kind, names, said in groups:
        where = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
        lines.append(f"  {len(names)} {kind} ({where}): {said}")
    return lines
