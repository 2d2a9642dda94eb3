"""Which numbers share a mean: a block of samples, channels and positions, drawn for four normalizations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

SAMPLES, CHANNELS, POSITIONS = 3, 4, 3
SIZE, DEPTH = 20, (11, -9)  # px: a cell's edge; one sample further back


@dataclass(frozen=True)
class Cube:
    """One normalization: its name, in words for what there is one mean, and the block's visible cells.

    Attributes:
        means: how many means there are, as a product; each: over how many values one is taken.
        cells: the corners of each visible cell, as SVG has them, and whether it is one of those that share one mean.
    """

    name: str
    shares: str
    means: str
    each: str
    cells: list[tuple[str, bool]]


def cubes() -> list[Cube]:
    """Return the four, batch norm first."""
    last = CHANNELS - 1
    return [
        Cube("Batch norm", "channel, over all samples and positions", "C", "N·S", _cells(lambda n, c: c == last)),
        Cube("Layer norm", "sample, over all channels and positions", "N", "C·S", _cells(lambda n, c: n == 0)),
        Cube(
            "Group norm, G groups",
            "sample and group of channels, over their positions",
            "N·G",
            "(C/G)·S",
            _cells(lambda n, c: n == 0 and c >= CHANNELS // 2),
        ),
        Cube(
            "Instance norm",
            "sample and channel, over its positions",
            "N·C",
            "S",
            _cells(lambda n, c: n == 0 and c == last),
        ),
    ]


def _cells(shares: Callable[[int, int], bool]) -> list[tuple[str, bool]]:
    """Return the cells in sight: front the first sample, top the first position, side the last channel."""
    c, n, s = (1, 0, 0), (0, 1, 0), (0, 0, 1)
    front = [((i, 0, k), (c, s), shares(0, i)) for i in range(CHANNELS) for k in range(POSITIONS)]
    top = [((i, j, 0), (c, n), shares(j, i)) for i in range(CHANNELS) for j in range(SAMPLES)]
    side = [((CHANNELS, j, k), (n, s), shares(j, CHANNELS - 1)) for j in range(SAMPLES) for k in range(POSITIONS)]
    return [(_corners(at, along), shared) for at, along, shared in (*front, *top, *side)]


def _corners(at: tuple[int, ...], along: tuple[tuple[int, ...], tuple[int, ...]]) -> str:
    one, two = along
    corners = [(0, 0), (1, 0), (1, 1), (0, 1)]
    places = [[a + i * x + j * y for a, x, y in zip(at, one, two, strict=True)] for i, j in corners]
    return " ".join(f"{SIZE * c + DEPTH[0] * n},{SIZE * s + DEPTH[1] * n}" for c, n, s in places)
