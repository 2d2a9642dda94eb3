"""Tensors between bands of NaN: what reads outside of one computes NaN, and what writes outside of one is seen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_BYTES = 1 << 16  # of a band: past the end of a tile
_NAN = 0xFF  # of such bytes every floating-point type reads NaN, and bool True
_NOT_NAN = 0xFE  # so that a NaN which is written is seen, too


def banded(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """A copy of the tensor with its strides, in the middle of a buffer of NaN; and that buffer."""
    within, buffer = _between(tensor, _NAN)
    within.copy_(tensor)
    return within, buffer


class Bands(TorchFunctionMode):
    """While it is entered, what torch.empty_like and Tensor.new_empty make is filled, and has bands around it."""

    def __init__(self) -> None:
        super().__init__()
        self._made: list[tuple[Tensor, Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func in (torch.empty_like, Tensor.new_empty):
            made, buffer = _between(made, _NOT_NAN)
            self._made.append((made, buffer))
        return made

    def broken(self) -> int:
        """How many of them have something written around them."""
        return sum(_is_broken(*each) for each in self._made)


def _between(tensor: Tensor, fill: int) -> tuple[Tensor, Tensor]:
    size = tensor.element_size()
    extent = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    extent = extent if tensor.numel() else 0
    buffer = torch.full((2 * _BYTES + -(-extent * size // 8) * 8,), fill, dtype=torch.uint8, device=tensor.device)
    return buffer.view(tensor.dtype).as_strided(tensor.shape, tensor.stride(), _BYTES // size), buffer


def _is_broken(within: Tensor, buffer: Tensor) -> bool:
    """Of a dense tensor: whether a byte before or after it is another than it was."""
    end = _BYTES + within.numel() * within.element_size()
    return not bool((buffer[:_BYTES] == _NOT_NAN).all() and (buffer[end:] == _NOT_NAN).all())
