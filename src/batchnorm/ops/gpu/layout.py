"""How a tensor lies in memory, as kernels walk it: rows of columns, for all channels at once or channel by channel.

channels last, (N, C)     rows of C columns, one a channel
short planes              a sample a row of C * S columns; S columns one after the other are of one channel
planes                    of each channel by itself: a sample a row of S columns

What is written lies as the schema says, dense; x itself may have gaps between its rows.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

# From so many positions on a plane fills a program's tile by itself; short ones do from so many on where the batch is
# so small that partial sums for every column would cost as much as the values.
_LONG, _SHORT, _SMALL_BATCH = 1024, 256, 64
_COLUMNS = 1 << 30  # of a row: with a tile more they are still far from what 32 bits hold


class View(NamedTuple):
    """x (N, C, *) as kernels walk it; strides in values.

    Attributes:
        planes: walked channel by channel.
        rows, columns: of each channel if `planes`, else of all channels together.
        inner: how many columns one after the other are of one channel.
        channels: column c is of channel c // inner % channels, unless `planes`.
        row, channel: strides of what is dense: from row to row, and from channel to channel.
        x_row, x_channel: x's own.
    """

    planes: bool
    rows: int
    columns: int
    inner: int
    channels: int
    row: int
    channel: int
    x_row: int
    x_channel: int

    @property
    def positions(self) -> int:
        """Values per channel."""
        return self.rows * self.inner


def view_of(x: Tensor) -> tuple[View, Tensor]:
    """The view of x, and x: copied if no view is of its strides."""
    view, memory_format, copied = _seen(x.shape, x.stride())
    return view, x.contiguous(memory_format=memory_format) if copied else x


def outline(x: Tensor) -> View:
    """The view that `view_of` gives, without the copy."""
    return _seen(x.shape, x.stride())[0]


def format_of(x: Tensor) -> torch.memory_format:
    """In which what is written lies: as `suggest_memory_format`, which the schema asks, but a tenth of its time."""
    return _seen(x.shape, x.stride())[1]


def is_too_long(x: Tensor) -> bool:
    """Whether a row may have more columns than the kernels count in 32 bits; of rows there may be any number."""
    if x.numel() < _COLUMNS:
        return False
    space = math.prod(x.shape[2:])
    return max(space, x.size(1) * min(space, _LONG)) >= _COLUMNS


@lru_cache(maxsize=4096)
def _seen(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[View, torch.memory_format, bool]:
    """The view, the memory format of what is written, and whether x is copied to be viewed."""
    memory_format = suggest_memory_format(torch.empty_strided(shape, strides, device="meta"))
    samples, channels, *sizes = shape
    space, own = math.prod(sizes), _rows_of(shape, strides, memory_format)
    if _channels_last(memory_format) or space == 1:
        x_row, x_channel = own or (channels, 1)
        view = View(False, samples * space, channels, 1, channels, channels, 1, x_row, x_channel)
    else:
        x_row, x_channel = own or (channels * space, space)
        long = space >= _LONG or (space >= _SHORT and samples < _SMALL_BATCH) or x_channel != space
        columns = space if long else channels * space
        view = View(long, samples, columns, space, channels, channels * space, space, x_row, x_channel)
    return view, memory_format, own is None


def like(tensor: Tensor | None, x: Tensor) -> Tensor | None:
    """Another operand of x's shape, dense as what is written: copied if it lies otherwise, as an expanded gradient."""
    return None if tensor is None else tensor.contiguous(memory_format=format_of(x))


def _channels_last(memory_format: torch.memory_format) -> bool:
    return memory_format is not torch.contiguous_format


def _rows_of(
    shape: tuple[int, ...], strides: tuple[int, ...], memory_format: torch.memory_format
) -> tuple[int, int] | None:
    """The strides of rows and channels of a view in that format; None if there is none."""
    samples, channels, *space = shape
    per_sample, per_channel, *per_position = strides
    joined = _joined(space, per_position)
    if joined is None:
        return None
    position, size = joined, math.prod(space)
    if _channels_last(memory_format) or size == 1:
        if channels > 1 and per_channel != 1:
            return None
        if size == 1:
            return (per_sample if samples > 1 else channels), 1
        if position < channels or (samples > 1 and per_sample != position * size):
            return None
        return position, 1
    if position != 1 or (channels > 1 and per_channel < size):
        return None
    channel = per_channel if channels > 1 else size
    row = per_sample if samples > 1 else channel * channels
    return (row, channel) if row >= channel * (channels - 1) + size else None


def _joined(sizes: list[int], strides: list[int]) -> int | None:
    """The one stride by which all positions follow each other; None if they do not."""
    stride, follows = 1, None
    for size, own in zip(reversed(sizes), reversed(strides), strict=True):
        if size == 1:
            continue
        if follows is None:
            stride = own
        elif own != follows:
            return None
        follows = own * size
    return stride
