"""How a view is cut into programs and tiles: by shape and strides only, so that every GPU adds in the same order."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from .layout import View

_TILE = 2048  # values a program holds at a time: 16 a thread
_WARPS = 4
_PROGRAMS = 2048  # that a large tensor is cut into, about: some waves on the largest GPU
_SMALLEST, _LARGEST = 2 * _TILE, 128 * _TILE  # values a program sums; per sum in float32 at most 128 are added
_MAPPED = 8 * _TILE  # values a program maps
_WIDTHS = (256, 128, 64)
_JOINED = 64  # rows that are joined to one at most
_VECTOR = 8  # values of 2 bytes in one load of 16


class Cut(NamedTuple):
    """One launch, of tiles * parts programs.

    Attributes:
        view: that is walked; short rows joined.
        block_rows, block_columns: a tile.
        tiles: programs side by side: tiles of columns, or channels.
        parts: programs one below the other, of which each sums by itself; `parts_of_columns` of them to a row.
        rows_per_part, columns_per_part: what one walks.
        align: a divisor of all strides and widths, so that the compiler knows how wide it may load.
    """

    view: View
    block_rows: int
    block_columns: int
    tiles: int
    parts: int
    parts_of_columns: int
    rows_per_part: int
    columns_per_part: int
    align: int

    @property
    def programs(self) -> int:
        """How many there are."""
        return self.tiles * self.parts

    @property
    def partials(self) -> int:
        """Partial sums per channel."""
        per_part = 1 if self.view.planes else self.view.columns // self.view.channels
        return self.parts * per_part


WARPS = _WARPS


@lru_cache(maxsize=4096)
def cut(view: View, sums: bool, masked: bool = False) -> Cut:
    """Cut a view to be summed, or mapped value by value."""
    if view.planes:
        return _planes(view, sums)
    view, width = (view, _narrowest(view.columns)) if masked else _joined(view)
    tiles = ceil(view.columns, width)
    block_rows = min(_TILE // width, _power(view.rows))
    values = _values(view.rows * view.columns, sums)
    rows = _multiple(ceil(values, width), block_rows)
    return Cut(view, block_rows, width, tiles, ceil(view.rows, rows), 1, rows, width, _alignment(view))


def _planes(view: View, sums: bool) -> Cut:
    width = min(_TILE, _power(view.columns))
    block_rows = min(_TILE // width, _power(view.rows))
    values = _values(view.rows * view.columns * view.channels, sums)
    if view.columns <= values:
        rows, columns = _multiple(values // view.columns, block_rows), _multiple(view.columns, width)
    else:
        rows, columns = block_rows, _multiple(values, width)
    across = ceil(view.columns, columns)
    parts = ceil(view.rows, rows) * across
    return Cut(view, block_rows, width, view.channels, parts, across, rows, columns, _alignment(view))


def _joined(view: View) -> tuple[View, int]:
    """The view with so many rows joined to one that tiles fit its width, and the tiles' width."""
    gaps = view.x_row != view.columns or view.row != view.columns
    best = (view, _narrowest(view.columns))
    if gaps or view.inner > 1:
        return best
    for joined in range(2, min(_JOINED, view.rows) + 1):
        if view.rows % joined == 0:
            columns = joined * view.columns
            wider = view._replace(rows=view.rows // joined, columns=columns, row=columns, x_row=columns)
            best = min(best, (wider, _narrowest(columns)), key=_waste)  # of equals the one joined less
    return best


def _waste(choice: tuple[View, int]) -> float:
    """Lanes per value; a row that is not a multiple of a vector costs most."""
    view, width = choice
    lanes = ceil(view.columns, width) * width / view.columns
    return round(lanes, 1) + (4 if view.columns % _VECTOR else 0)


def _narrowest(columns: int) -> int:
    """The width of tiles that leaves the fewest lanes idle; of equals the widest."""
    if columns <= _WIDTHS[-1]:
        return _power(columns)
    return min(_WIDTHS, key=lambda width: ceil(columns, width) * width)


def _values(total: int, sums: bool) -> int:
    return max(_SMALLEST, min(_LARGEST, _power(total // _PROGRAMS))) if sums else _MAPPED


def _alignment(view: View) -> int:
    strides = (view.columns, view.row, view.channel, view.x_row, view.x_channel)
    counted = strides if view.planes else (view.columns, view.row, view.x_row)
    return next(size for size in (16, 8, 4, 2, 1) if all(stride % size == 0 for stride in counted))


def _power(count: int) -> int:
    """The least power of two that is not below."""
    return 1 << max(count - 1, 0).bit_length()


def ceil(count: int, size: int) -> int:
    """count / size, rounded up; triton.cdiv would take microseconds."""
    return -(-count // size)


def _multiple(count: int, size: int) -> int:
    return max(ceil(count, size), 1) * size
