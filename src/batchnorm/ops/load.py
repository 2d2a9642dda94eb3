"""Loads the compiled operators; without them everything runs on plain PyTorch operators, and says so once."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

from . import fakes


def _load() -> bool:
    libraries = sorted(Path(__file__).parent.parent.glob("_C*.so")) + sorted(
        Path(__file__).parent.parent.glob("_C*.pyd")
    )
    if not libraries:
        warnings.warn(
            "batchnorm was installed without its compiled operators and runs on plain PyTorch operators: the same "
            "results up to rounding, slower. Install a C++ compiler and reinstall batchnorm to have them.",
            stacklevel=2,
        )
        return False
    torch.ops.load_library(str(libraries[0]))
    fakes.register()
    return True


COMPILED = _load()
"""Whether torch.ops.batchnorm has its operators."""
