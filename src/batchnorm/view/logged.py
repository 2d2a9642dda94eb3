"""What a user's own training logged, a loss or anything else, as series over the steps that fit the page."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .facts import plural
from .select import thin

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..runs.reader import Run

MOST_NAMES, MOST_POINTS, MOST_BROKEN = 12, 240, 60


@dataclass(frozen=True)
class Logged:
    """What was logged under one name.

    Attributes:
        name: as it was logged.
        steps, values: (n,) those shown; values that are not finite are among them.
        note: how many of how many are shown, and how many were not finite.
    """

    name: str
    steps: NDArray[np.int64]
    values: NDArray[np.float64]
    note: str

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows of the chart's data: step, value, broken; a value that is not finite is null and broken."""
        return [
            {"step": step, "value": value, "broken": ""}
            if math.isfinite(value)
            else {"step": step, "value": None, "broken": "logged"}
            for step, value in zip(self.steps.tolist(), self.values.tolist(), strict=True)
        ]


def logged(run: Run) -> tuple[list[Logged], int]:
    """Return what a run logged, by name in the order of first use, and how many more names there are.

    Of an experiment nothing: its curves compare the arms.
    """
    if run.arms:
        return [], 0
    found: dict[str, list[tuple[int, float]]] = {}
    for row in run.scalars():
        for name, value in row.items():
            if name != "step" and isinstance(value, (int, float)):
                found.setdefault(name, []).append((row["step"], _float(value)))
    series = [_series(name, points) for name, points in list(found.items())[:MOST_NAMES]]
    return series, len(found) - len(series)


def _series(name: str, points: list[tuple[int, float]]) -> Logged:
    steps = np.array([step for step, _ in points], np.int64)
    values = np.array([value for _, value in points])
    broken = np.flatnonzero(~np.isfinite(values))
    # What is thinned must not lose the very step at which a loss became NaN: the first of them is always kept.
    kept = np.union1d(thin(len(values), MOST_POINTS), broken[thin(len(broken), MOST_BROKEN)] if len(broken) else broken)
    said = []
    if len(kept) < len(values):
        said.append(f"{len(kept)} of {len(values):,} logged values, evenly spaced.")
    if len(broken):
        count = plural(len(broken), "value")
        said.append(f"{count} not finite (crosses), first at step {steps[broken[0]]:,}.")
    return Logged(name, steps[kept], values[kept], " ".join(said))


def _float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:  # an integer with more digits than any float has
        return math.inf if value > 0 else -math.inf
