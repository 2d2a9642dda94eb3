"""What one training step produced, on its way from the training's thread to the writer's. Uses NumPy only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from ..runs.schema import LayerInfo

ON_DEVICE = -2  # a count that travels with the numbers


class Way(IntEnum):
    """What the two vectors of one forward are; the first is always the mean."""

    NONE = 0
    RSTD = 1  # 1 / sqrt(variance + eps)
    VARIANCE = 2
    M2 = 3  # sum of squared deviations
    INVERT = 4  # nothing: both follow from how the running statistics moved


@dataclass(slots=True)
class Part:
    """One forward of a layer."""

    way: Way
    count: int


class Flats(NamedTuple):
    """The numbers of one snapshot. Layers in the order of `Layout`, a block (rows, channels) each.

    Attributes:
        moments: 2 rows a layer: of its first part.
        parameters: 4 rows a layer: gamma, beta, running mean, running variance.
        gradients: 2 rows a layer; None when nobody stepped.
        extras: 2 rows for every part after a layer's first.
        counts: int64, the counts that were on the device: of first parts, then of the others.
        tracked: int64, num_batches_tracked of each layer; None when nothing is to be inverted.
    """

    moments: np.ndarray
    parameters: np.ndarray
    gradients: np.ndarray | None
    extras: np.ndarray
    counts: np.ndarray
    tracked: np.ndarray | None


@dataclass
class Snapshot:
    """What one step produced, on its way to the file. Lists hold an entry a layer, in the order of `Layout`."""

    step: int
    index: int | None  # of its record; None: it only says where the running statistics stood
    fetch: Callable[[], Flats]
    ways: list[int]  # of a layer's first part in the step
    counts: list[int]  # values a channel in it
    more: list[tuple[int, Part]]  # further parts, with the layer's index
    forwards: list[int]
    present: list[int]  # bit q: QUANTITIES[q] exists
    momenta: list[float | None]
    unbiased: list[bool]  # whether that is the variance that is tracked
    traced_counts: list[int]


class Extra(NamedTuple):
    """What is written beside the records: of a probe, of a worked step.

    Attributes:
        step: whose it is.
        contents: made by the writer's thread: by the name of the file, in the order of writing, the payload of a frame
            or rows of JSON.
    """

    step: int
    contents: Callable[[], Mapping[str, bytes | Sequence[Mapping[str, Any]]]]


class Group(NamedTuple):
    """Layers of one width, which are handled as one array."""

    channels: int
    members: slice  # in the order of `Layout`
    start: int  # channels before this group


class Layout:
    """The order in which layers travel: sorted by channels, so that those of one width lie side by side."""

    def __init__(self, layers: Sequence[LayerInfo]) -> None:
        self.order = sorted(range(len(layers)), key=lambda i: layers[i].channels)
        widths = np.array([layers[i].channels for i in self.order], np.int64)
        self.starts = np.concatenate([[0], np.cumsum(widths)])
        self.channels = int(self.starts[-1])
        edges = [0, *(np.flatnonzero(np.diff(widths)) + 1).tolist(), len(widths)] if len(widths) else []
        self.groups = [Group(int(widths[a]), slice(a, b), int(self.starts[a])) for a, b in pairwise(edges)]

    def blocks(self, flat: np.ndarray, rows: int) -> Iterator[np.ndarray]:
        """Views of (..., rows * channels) as (..., layers, rows, channels), a group at a time."""
        for group in self.groups:
            n = group.members.stop - group.members.start
            start, size = group.start * rows, n * rows * group.channels
            yield flat[..., start : start + size].reshape(*flat.shape[:-1], n, rows, group.channels)

    def block(self, flat: np.ndarray, rows: int, i: int) -> np.ndarray:
        """The (..., rows, channels) of one layer, a view of (..., all rows * channels)."""
        start, stop = self.starts[i], self.starts[i + 1]
        return flat[..., start * rows : stop * rows].reshape(*flat.shape[:-1], rows, stop - start)
