"""From what a step left behind to the bytes of its records: variances, quantiles, alerts. NumPy alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from .quantiles import summarize
from .schedule import Schedule
from .schema import COLUMNS, F4, QUANTITIES, LayerInfo, stats_dtype, vector_starts

UNKNOWN = -1  # a count that nobody could tell
_BATCH, _PARAMETERS, _GRADIENTS = (0, 1), (2, 3, 6, 7), (4, 5)  # places in QUANTITIES, as they travel together


class Way(IntEnum):
    """What the two vectors of one forward are; the first is always the mean."""

    NONE = 0
    RSTD = 1  # 1 / sqrt(variance + eps)
    VARIANCE = 2
    M2 = 3  # sum of squared deviations
    INVERT = 4  # nothing: both follow from how the running statistics moved


@dataclass(slots=True)
class Part:
    """One forward of a layer; count None where it travels with the numbers, being on the device."""

    way: Way
    count: int | None


class Flats(NamedTuple):
    """The numbers of one snapshot. Layers in the order of `Layout`, a block (rows, channels) each.

    Attributes:
        moments: 2 rows a layer: of its first part.
        parameters: 4 rows a layer: gamma, beta, running mean, running variance.
        gradients: 2 rows a layer; None when nobody stepped.
        extras: 2 rows for every part after a layer's first.
        counts: int64, those counts that were on the device.
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
    """What one step left behind, on its way to the file. Lists hold an entry a layer, in the order of `Layout`."""

    step: int
    recorded: bool  # else it only says where the running statistics stood
    fetch: Callable[[], Flats]
    parts: list[list[Part]]
    forwards: list[int]
    present: list[int]  # bit q: QUANTITIES[q] exists
    momenta: list[float | None]
    traced_counts: list[int]


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
        """The (rows, channels) of one layer, a view."""
        return flat[self.starts[i] * rows : self.starts[i + 1] * rows].reshape(rows, -1)


class Records(NamedTuple):
    """What is to be appended: (step, payload) to the journals, rows to the alerts."""

    stats: list[tuple[int, bytes]]
    vectors: list[tuple[int, bytes]]
    alerts: list[dict[str, Any]]


class Digest:
    """Turns snapshots, in the order of their steps, into records; many at once cost little more than one."""

    def __init__(self, layers: Sequence[LayerInfo], schedule: Schedule | None, every: int) -> None:
        self._layers = layers
        self._layout = Layout(layers)
        self._eps = np.array([layers[i].eps for i in self._layout.order])
        self._schedule, self._every = schedule, every
        self._alerted = np.zeros((len(layers), len(QUANTITIES)), np.float32)
        self._previous: tuple[np.ndarray, np.ndarray | None] | None = None

    @np.errstate(all="ignore")  # what is not finite is data here: it is counted, and goes into the alerts
    def __call__(self, snapshots: Sequence[Snapshot]) -> Records:
        kept, flats, batches, counts, known = [], [], [], [], []
        for snapshot in snapshots:
            flat = snapshot.fetch()
            if snapshot.recorded:
                batch, count, told = self._batch(snapshot, flat)
                kept.append(snapshot)
                flats.append(flat)
                batches.append(batch)
                counts.append(count)
                known.append(told)
            self._previous = flat.parameters, flat.tracked
        if not kept:
            return Records([], [], [])
        nothing = np.zeros(2 * self._layout.channels, np.float32)
        sections = {
            _BATCH: np.stack(batches),
            _PARAMETERS: np.stack([flat.parameters for flat in flats]),
            _GRADIENTS: np.stack([nothing if flat.gradients is None else flat.gradients for flat in flats]),
        }
        bits = np.array([snapshot.present for snapshot in kept], np.int64).reshape(len(kept), -1)
        present = (bits[..., None] >> np.arange(len(QUANTITIES)) & 1).astype(bool)
        present[..., _BATCH] = np.array(known)[..., None]
        return self._records(kept, sections, present, np.array(counts))

    def _records(
        self,
        kept: list[Snapshot],
        sections: dict[tuple[int, ...], np.ndarray],
        present: np.ndarray,
        counts: np.ndarray,
    ) -> Records:
        stats = np.empty((*present.shape, len(COLUMNS)), np.float32)
        for places, values in sections.items():
            for group, block in zip(self._layout.groups, self._layout.blocks(values, len(places)), strict=True):
                stats[:, group.members, places] = summarize(block)
        stats[~present] = np.nan
        out = np.empty(len(kept), stats_dtype(self._layers))
        order = self._layout.order
        out["count"][:, order] = counts
        out["forwards"][:, order] = [snapshot.forwards for snapshot in kept]
        out["stats"][:, order] = stats
        steps = [snapshot.step for snapshot in kept]
        vectors = [
            (step, self._vectors({places: values[k] for places, values in sections.items()}, present[k]))
            for k, step in enumerate(steps)
            if self._schedule and self._schedule.keeps(step // self._every)
        ]
        alerts = [row for k, step in enumerate(steps) for row in self._alerts(step, out["stats"][k, ..., -1])]
        return Records([(step, row.tobytes()) for step, row in zip(steps, out, strict=True)], vectors, alerts)

    def _vectors(self, sections: dict[tuple[int, ...], np.ndarray], present: np.ndarray) -> bytes:
        """Every quantity of every layer, whole, layers in model order; NaN where it does not exist."""
        starts = vector_starts(self._layers, len(QUANTITIES))
        out = np.empty(starts[-1], F4)
        for i, place in enumerate(self._layout.order):
            rows = out[starts[place] : starts[place + 1]].reshape(len(QUANTITIES), -1)
            for places, values in sections.items():
                rows[list(places)] = self._layout.block(values, len(places), i)
            rows[~present[i]] = np.nan
        return out.tobytes()

    def _alerts(self, step: int, nonfinite: np.ndarray) -> Iterator[dict[str, Any]]:
        """A row for each quantity whose number of non-finite values has changed and is not 0."""
        fired = (nonfinite > 0) & (nonfinite != self._alerted)
        self._alerted = np.where(np.isnan(nonfinite), self._alerted, nonfinite)
        for i, q in zip(*np.nonzero(fired), strict=True):
            yield {
                "step": step,
                "layer": self._layers[i].name,
                "quantity": QUANTITIES[q],
                "what": "nonfinite",
                "count": int(nonfinite[i, q]),
            }

    def _batch(self, snapshot: Snapshot, flat: Flats) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Mean and biased variance of all that each layer saw in the step, its count, and whether they are known."""
        on_device = iter(flat.counts.tolist())
        parts = [
            [part if part.count is not None else replace(part, count=next(on_device)) for part in of_layer]
            for of_layer in snapshot.parts
        ]
        first = [of_layer[0] if of_layer else Part(Way.NONE, 0) for of_layer in parts]
        ways = np.array([part.way for part in first], np.int64)
        counts = np.array([part.count for part in first], np.int64)
        out = flat.moments.astype(np.float32)
        for group, source, target in zip(
            self._layout.groups, self._layout.blocks(flat.moments, 2), self._layout.blocks(out, 2), strict=True
        ):
            at = group.members
            target[:, 1] = _variance(source[:, 1], ways[at, None], counts[at, None], self._eps[at, None])
        known = counts != 0
        more = 0
        for i, of_layer in enumerate(parts):
            rows = self._layout.block(out, 2, i)
            if any(part.way == Way.INVERT for part in of_layer) or (not of_layer and flat.tracked is not None):
                counts[i], known[i] = self._invert(rows, i, of_layer, snapshot, flat)
            size = rows.shape[1]
            for part in of_layer[1:]:
                pair = flat.extras[more : more + 2 * size].reshape(2, size)
                more += 2 * size
                known[i] |= counts[i] == 0 and part.count != 0
                counts[i] = merge(rows, counts[i], pair, part, self._eps[i])
        return out, counts, known

    def _invert(self, rows: np.ndarray, i: int, parts: list[Part], snapshot: Snapshot, flat: Flats) -> tuple[int, bool]:
        """Fill in a batch's mean and variance from running = (1 - momentum) * running + momentum * batch.

        That can be undone when exactly one batch moved it. Returns the count, 0 if the layer did not run, and whether
        it could be undone.
        """
        count = parts[0].count if parts else snapshot.traced_counts[i]
        assert count is not None
        if self._previous is None or self._previous[1] is None or flat.tracked is None:
            return (count if parts else 0), False
        moved = int(flat.tracked[i] - self._previous[1][i])
        if not parts:  # no hook saw it: the count of forwards is the counter's
            if moved <= 0:
                return 0, False
            snapshot.forwards[i] = moved
        momentum = snapshot.momenta[i]
        share = 1.0 / float(flat.tracked[i]) if momentum is None and flat.tracked[i] else momentum
        if moved != 1 or len(parts) > 1 or not share:
            return count, False
        old = self._layout.block(self._previous[0], 4, i)[2:].astype(np.float64)
        new = self._layout.block(flat.parameters, 4, i)[2:].astype(np.float64)
        batch = (new - (1 - share) * old) / share
        if count > 0:  # torch tracks the unbiased variance
            batch[1] *= (count - 1) / count
        np.maximum(batch[1], 0, out=batch[1])
        rows[:] = batch
        return count, True


def _variance(second: np.ndarray, way: np.ndarray, count: np.ndarray, eps: np.ndarray) -> np.ndarray:
    """The biased variance from a forward's second vector; Way says what that is."""
    second = second.astype(np.float64)
    if (way == Way.RSTD).any():
        second = np.where(way == Way.RSTD, np.maximum(1 / second**2 - eps, 0), second)
    if (way == Way.M2).any():
        second = np.where(way == Way.M2, second / np.maximum(count, 1), second)
    return second


def merge(rows: np.ndarray, count: int, pair: np.ndarray, part: Part, eps: float) -> int:
    """Merge a further forward into a layer's mean and variance (Chan et al. 1979); returns the joint count."""
    assert part.count is not None
    if part.count <= 0 or count < 0:
        return count
    total = count + part.count
    mean = pair[0].astype(np.float64)
    variance = _variance(pair[1], np.array(part.way), np.array(part.count), np.array(eps))
    share = part.count / total
    delta = mean - rows[0]
    merged = (1 - share) * rows[1] + share * variance + share * (1 - share) * delta * delta
    rows[0], rows[1] = rows[0] + share * delta, merged
    return total
