"""The operators' arguments on a GPU: everything is checked before anything is written, as the C++ operators do."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..schema import DTYPES, STATISTICS, SUMS

_LIKE = ("residual", "dy", "y")
_VECTORS = ("weight", "bias", "running_mean", "running_var")
_ROWS = {"statistics": STATISTICS, "sums": SUMS}
_ACTIVATIONS = 11


def check(operator: str, given: dict[str, Any]) -> None:
    """Raise a RuntimeError for arguments that the kernels could not read or write safely."""
    first = given["x"] if "x" in given else given["statistics"]
    wrong = _in_input(first, given) if "x" in given else None
    if wrong is None:
        channels = first.size(1) if "x" in given else given["running_mean"].numel()
        tensors = ((name, value) for name, value in given.items() if isinstance(value, Tensor))
        found = (_in_one(name, value, first, channels, given.get("virtual_batch", 0)) for name, value in tensors)
        wrong = next((each for each in found if each is not None), None) or _in_values(operator, first, given)
    if wrong is not None:
        raise RuntimeError(wrong)


# Each check returns what is wrong, or None. Messages are formatted only when needed, because this runs in every call.


def _in_input(x: Tensor, given: dict[str, Any]) -> str | None:
    if not (x.is_cuda or x.is_cpu):  # the CPU's is the interpreter's
        return "the input must have memory on a GPU"
    if x.dim() < 2:
        return f"the input must be (N, C, *), got {tuple(x.shape)}"
    if x.dtype not in DTYPES:
        return f"the input must be floating point, got {x.dtype}"
    if not 0 <= given.get("act", 0) < _ACTIVATIONS:
        return f"act must be the code of an activation, got {given.get('act')}"
    return None if given.get("virtual_batch", 0) >= 0 else "virtual_batch must not be negative"


def _in_values(operator: str, first: Tensor, given: dict[str, Any]) -> str | None:
    if operator not in ("forward", "forward_"):
        return f"eps must not be negative, got {given['eps']}" if given.get("eps", 0) < 0 else None
    if given["mask"] is None and first.size(0) * math.prod(first.shape[2:]) == 1:
        return "a channel must have more than one value, because one value has no variance"
    return f"eps must be positive where the batch is measured, got {given['eps']}" if given["eps"] <= 0 else None


def _in_one(name: str, value: Tensor, first: Tensor, channels: int, virtual_batch: int) -> str | None:
    if value.layout is not torch.strided:
        return f"{name} must be strided, got {value.layout}"
    if value.device != first.device:
        return f"{name} must be on the input's device, {first.device}, is on {value.device}"
    if name in _LIKE:
        if value.shape != first.shape:
            return f"{name} must have the input's shape, got {tuple(value.shape)}"
        if value.dtype != first.dtype:
            return f"{name} must have the input's dtype, {first.dtype}, got {value.dtype}"
    elif name in _VECTORS:
        if value.shape != (channels,):
            return f"{name} must have {channels} values, got {tuple(value.shape)}"
        if value.dtype not in DTYPES:
            return f"{name} must be floating point, got {value.dtype}"
    elif name in _ROWS:
        rows = _ROWS[name]
        if value.dim() != (3 if virtual_batch else 2) or value.size(0) != rows or value.size(-1) != channels:
            return f"{name} must have {rows} rows of {channels}, got {tuple(value.shape)}"
        if value.dtype != torch.float64:
            return f"{name} must be float64, got {value.dtype}"
    elif name == "mask":
        if value.dtype != torch.bool:
            return f"the mask must be bool, got {value.dtype}"
        samples = (first.size(0), *first.shape[2:])
        if value.shape != samples:
            return f"the mask must be {samples}, got {tuple(value.shape)}"
    elif name == "batches" and (value.numel() != 1 or value.is_floating_point()):
        return "batches must be one integer"
    return None if _has_memory(value) else f"{name} has no memory behind it: its storage was freed or cut"


def _has_memory(tensor: Tensor) -> bool:
    count = tensor.numel()
    if count and not tensor.is_contiguous():
        count = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return not count or (tensor.untyped_storage().nbytes() >= (tensor.storage_offset() + count) * tensor.element_size())
