"""Turn a step's snapshot into the bytes of its records: variances, quantiles, alerts. Uses NumPy only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from ..runs.schema import COLUMNS, F4, QUANTITIES, LayerInfo, stats_dtype, vector_starts
from .quantiles import summarize
from .schedule import Schedule
from .snapshot import ON_DEVICE, Flats, Layout, Part, Snapshot, Way

_BATCH, _PARAMETERS, _GRADIENTS = (0, 1), (2, 3, 6, 7), (4, 5)  # places in QUANTITIES, as they travel together


class Standing(NamedTuple):
    """Where the running statistics stood before a step: as in `Flats`."""

    parameters: np.ndarray
    tracked: np.ndarray | None


class Records(NamedTuple):
    """What is to be appended: (step, payload) to the journals, rows to the alerts."""

    stats: list[tuple[int, bytes]]
    vectors: list[tuple[int, bytes]]
    alerts: list[dict[str, Any]]


class Digest:
    """Turns snapshots, in the order of their steps, into records; many at once cost little more than one."""

    def __init__(self, layers: Sequence[LayerInfo], schedule: Schedule | None, alerted: np.ndarray) -> None:
        self._layers = layers
        self._layout = Layout(layers)
        self._eps = np.array([layers[i].eps for i in self._layout.order])
        self._schedule = schedule
        self._alerted = alerted  # (layers, quantities): how many are known not to be finite
        self._previous: Standing | None = None

    @np.errstate(all="ignore")  # what is not finite is data here: it is counted, and goes into the alerts
    def __call__(self, snapshots: Sequence[Snapshot]) -> Records:
        kept, flats, before = [], [], []
        for snapshot in snapshots:
            flat = snapshot.fetch()
            if snapshot.index is not None:
                kept.append(snapshot)
                flats.append(flat)
                before.append(self._previous)
            self._previous = Standing(flat.parameters, flat.tracked)
        if not kept:
            return Records([], [], [])
        batches, counts, known = self._batches(kept, flats, before)
        nothing = np.zeros(2 * self._layout.channels, np.float32)
        sections = {
            _BATCH: batches,
            _PARAMETERS: np.stack([flat.parameters for flat in flats]),
            _GRADIENTS: np.stack([nothing if flat.gradients is None else flat.gradients for flat in flats]),
        }
        bits = np.array([snapshot.present for snapshot in kept], np.int64).reshape(len(kept), -1)
        present = (bits[..., None] >> np.arange(len(QUANTITIES)) & 1).astype(bool)
        present[..., _BATCH] = known[..., None]
        return self._records(kept, sections, present, counts)

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
        whole = [k for k, snapshot in enumerate(kept) if self._schedule and self._schedule.keeps(snapshot.index or 0)]
        vectors = self._vectors({places: values[whole] for places, values in sections.items()}, present[whole])
        nonfinite = out["stats"][..., -1]
        alerts = []
        if self._alerted.any() or (nonfinite > 0).any():
            alerts = [
                row for step, counted in zip(steps, nonfinite, strict=True) for row in self._alerts(step, counted)
            ]
        return Records(
            stats=[(step, row.tobytes()) for step, row in zip(steps, out, strict=True)],
            vectors=[(steps[k], row.tobytes()) for k, row in zip(whole, vectors, strict=True)],
            alerts=alerts,
        )

    def _vectors(self, sections: dict[tuple[int, ...], np.ndarray], present: np.ndarray) -> np.ndarray:
        """Every quantity of every layer, whole, a row a step, layers in model order; NaN where it does not exist."""
        starts = vector_starts(self._layers, len(QUANTITIES))
        out = np.empty((len(present), starts[-1]), F4)
        for i, place in enumerate(self._layout.order):
            rows = out[:, starts[place] : starts[place + 1]].reshape(
                len(present), len(QUANTITIES), self._layers[place].channels
            )
            for places, values in sections.items():
                rows[:, places] = self._layout.block(values, len(places), i)
            rows[~present[:, i]] = np.nan
        return out

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

    def _batches(
        self, kept: list[Snapshot], flats: list[Flats], before: list[Standing | None]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Mean and biased variance of all that each layer saw in each step, its count, and whether they are known."""
        ways = np.array([snapshot.ways for snapshot in kept], np.int64)
        counts = np.array([snapshot.counts for snapshot in kept], np.int64)
        for row, flat in zip(counts, flats, strict=True):
            there = row == ON_DEVICE
            row[there] = flat.counts[: there.sum()]
        moments = np.stack([flat.moments for flat in flats])
        out = moments.astype(np.float32)
        for group, source, target in zip(
            self._layout.groups, self._layout.blocks(moments, 2), self._layout.blocks(out, 2), strict=True
        ):
            at = group.members
            target[:, :, 1] = _variance(source[:, :, 1], ways[:, at, None], counts[:, at, None], self._eps[at, None])
        known = counts != 0
        for k, (snapshot, flat) in enumerate(zip(kept, flats, strict=True)):
            if flat.tracked is not None:
                for i in range(len(self._layers)):
                    if ways[k, i] == Way.INVERT or not snapshot.forwards[i]:
                        rows = self._layout.block(out[k], 2, i)
                        counts[k, i], known[k, i] = self._invert(rows, i, snapshot, flat, before[k])
            self._add_more(out[k], counts[k], known[k], snapshot, flat)
        return out, counts, known

    def _add_more(
        self, out: np.ndarray, counts: np.ndarray, known: np.ndarray, snapshot: Snapshot, flat: Flats
    ) -> None:
        """Merge what a layer measured in its second and later forwards of a step into what it did in its first."""
        on_device = iter(flat.counts[snapshot.counts.count(ON_DEVICE) :].tolist())
        start = 0
        for i, part in snapshot.more:
            rows = self._layout.block(out, 2, i)
            pair = flat.extras[start : start + rows.size].reshape(rows.shape)
            start += rows.size
            part = part if part.count != ON_DEVICE else replace(part, count=next(on_device))
            known[i] |= counts[i] == 0 and part.count != 0
            counts[i] = merge(rows, int(counts[i]), pair, part, self._eps[i])

    def _invert(
        self, rows: np.ndarray, i: int, snapshot: Snapshot, flat: Flats, before: Standing | None
    ) -> tuple[int, bool]:
        """Fill in a batch's mean and variance from running = (1 - momentum) * running + momentum * batch.

        That can be undone when exactly one batch moved it. Returns the count, 0 if the layer did not run, and whether
        it could be undone.
        """
        hooked = snapshot.forwards[i] > 0
        count = snapshot.counts[i] if hooked else snapshot.traced_counts[i]
        if before is None or before.tracked is None or flat.tracked is None:
            return (count if hooked else 0), False
        moved = int(flat.tracked[i] - before.tracked[i])
        if not hooked:  # the counter alone says how often it ran
            if moved <= 0:
                return 0, False
            snapshot.forwards[i] = moved
        momentum = snapshot.momenta[i]
        share = 1.0 / float(flat.tracked[i]) if momentum is None and flat.tracked[i] else momentum
        if moved != 1 or not share:
            return count, False
        old = self._layout.block(before.parameters, 4, i)[2:].astype(np.float64)
        new = self._layout.block(flat.parameters, 4, i)[2:].astype(np.float64)
        batch = (new - (1 - share) * old) / share
        if count > 0 and snapshot.unbiased[i]:
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
