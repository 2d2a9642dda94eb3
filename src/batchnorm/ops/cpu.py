"""Loads the C++ operators of csrc/, for tensors in the CPU's memory: exact, and the same bits on every CPU."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

from . import schema  # noqa: F401  (what is implemented has to be defined)


def _load() -> bool:
    package = Path(__file__).parent.parent
    libraries = sorted(package.glob("_C*.so")) + sorted(package.glob("_C*.pyd"))
    if not libraries:
        warnings.warn(
            "batchnorm was installed without its compiled operators and runs on PyTorch's own: slower on CPUs, and as "
            "exact as those. Install a C++ compiler and reinstall batchnorm to have them.",
            stacklevel=2,
        )
        return False
    torch.ops.load_library(str(libraries[0]))
    return True


COMPILED = _load()
"""Whether torch.ops.batchnorm has its operators for the CPU."""
