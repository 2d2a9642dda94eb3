"""timm, importable beside any build of torch."""

from __future__ import annotations

import sys
from types import ModuleType

import torch

# The operators that torchvision describes to torch.export as it is imported, whether it could load its library or not.
_OPERATORS = ("nms", "qnms")


def import_timm() -> ModuleType:
    """timm, which imports torchvision, whose compiled operators need the very build of torch they were made for.

    The models here use none of them. Where they cannot be loaded, operators of these names without any code let the
    rest of torchvision be imported.
    """
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        for name in _OPERATORS:
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float threshold) -> Tensor")
    import timm

    return timm
