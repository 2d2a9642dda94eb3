"""Libraries that import torchvision, importable beside any build of torch."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType

import torch

# The operators that torchvision describes to torch.export as it is imported, whether it could load its library or not.
_OPERATORS = ("nms", "qnms")


def import_with_torchvision(name: str) -> ModuleType:
    """A module that imports torchvision, whose compiled operators need the very build of torch they were made for.

    What is tested here uses none of them. Where they cannot be loaded, operators of these names without any code let
    the rest of torchvision be imported.
    """
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        for loaded in [loaded for loaded in sys.modules if loaded.split(".")[0] == "torchvision"]:
            del sys.modules[loaded]
        for operator in _OPERATORS:
            torch.library.define(f"torchvision::{operator}", "(Tensor dets, Tensor scores, float threshold) -> Tensor")
    return import_module(name)


def import_timm() -> ModuleType:
    """timm."""
    return import_with_torchvision("timm")
