"""The operators' arguments on a GPU: everything is checked before anything is written, as the C++ operators do."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_LIKE = ("residual", "dy", "y")
_VECTORS = ("weight", "bias", "running_mean", "running_var")
_ROWS = {"statistics": 3, "sums": 2}
_ACTIVATIONS = 11


def check(operator: str, given: dict[str, Any]) -> None:
    """Raise a RuntimeError of what the kernels could not read or write safely."""
    first = given["x"] if "x" in given else given["statistics"]
    _check(first.is_cuda or first.is_cpu, "the input must have memory on a GPU")  # the CPU's is the interpreter's
    if "x" in given:
        _check(first.dim() >= 2, f"the input must be (N, C, *), got {tuple(first.shape)}")
        _check(first.dtype in DTYPES, f"the input must be of floating point, got {first.dtype}")
        _check(first.layout is torch.strided, f"the input must be strided, got {first.layout}")
        _check(0 <= given.get("act", 0) < _ACTIVATIONS, f"there is no activation number {given.get('act')}")
        _check(given.get("virtual_batch", 0) >= 0, "a virtual batch has at least one item")
    channels = first.size(1) if "x" in given else given["running_mean"].numel()
    for name, value in given.items():
        if isinstance(value, Tensor):
            _check_one(name, value, first, channels)
    if operator in ("forward", "forward_"):
        lonely = first.size(0) * math.prod(first.shape[2:]) == 1
        _check(given["mask"] is not None or not lonely, "one value in a channel has no variance")
        _check(not given["eps"] <= 0, f"eps must be positive where the batch is measured, got {given['eps']}")
    elif "eps" in given:
        _check(not given["eps"] < 0, f"eps must not be negative, got {given['eps']}")


def _check_one(name: str, value: Tensor, first: Tensor, channels: int) -> None:
    _check(value.device == first.device, f"{name} must be on the input's device, {first.device}, is on {value.device}")
    _check(value.layout is torch.strided, f"{name} must be strided, got {value.layout}")
    if name in _LIKE:
        _check(value.shape == first.shape, f"{name} must have the input's shape, got {tuple(value.shape)}")
        _check(value.dtype == first.dtype, f"{name} must have the input's dtype, {first.dtype}, got {value.dtype}")
    elif name in _VECTORS:
        _check(value.shape == (channels,), f"{name} must have {channels} values, got {tuple(value.shape)}")
        _check(value.dtype in DTYPES, f"{name} must be of floating point, got {value.dtype}")
    elif name in _ROWS:
        rows = _ROWS[name]
        _check(value.size(0) == rows and value.size(-1) == channels, f"{name} must have {rows} rows of {channels}")
        _check(value.dtype == torch.float64, f"{name} must be float64, got {value.dtype}")
    elif name == "mask":
        _check(value.dtype == torch.bool, f"the mask must be bool, got {value.dtype}")
        samples = (first.size(0), *first.shape[2:])
        _check(value.shape == samples, f"the mask must be {samples}, got {tuple(value.shape)}")
    elif name == "batches":
        _check(value.numel() == 1 and not value.is_floating_point(), "batches must be one integer")
    _check(_has_memory(value), f"{name} has no memory behind it: its storage was freed or cut")


def _has_memory(tensor: Tensor) -> bool:
    if tensor.numel() == 0:
        return True
    last = tensor.storage_offset() + sum(
        (n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    return tensor.untyped_storage().nbytes() >= (last + 1) * tensor.element_size()


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise RuntimeError(message)
