"""Loads the C++ operators of csrc/, for tensors in the CPU's memory: exact, and the same bits on every CPU."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

from . import schema  # noqa: F401  (what is implemented has to be defined)

CURE = "take a wheel for your platform, or install GCC or Clang and build batchnorm again with --no-build-isolation"


def _load() -> bool:
    library = Path(__file__).parent.parent / "_C.so"
    if not library.exists():
        warnings.warn(
            "batchnorm was installed without its compiled operators and uses PyTorch's own: slower on CPUs, and as "
            f"exact as those. To get them, {CURE}.",
            stacklevel=2,
        )
        return False
    torch.ops.load_library(str(library))
    return True


COMPILED = _load()
"""Whether torch.ops.batchnorm has its operators for the CPU."""
