"""A run as maps of layers by steps: how batches differ, how far the tracked lag, how large gamma and its pushes are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ..runs.schema import COLUMNS, QUANTITIES
from .select import thin

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..runs.reader import Run

MAX_STEPS, MAX_LAYERS = 200, 60
NONFINITE = COLUMNS.index("nonfinite")
NORMAL_MEDIAN = 0.6745  # of the absolute value of a standard normal variable

# What each map is of: the recorded quantities whose values that were not finite are crossed in it.
MAPS = {
    "spread": ("batch_mean", "batch_var"),
    "gamma": ("gamma",),
    "drift": ("batch_mean", "batch_var", "running_mean"),
    "gradient": ("gamma_grad", "beta_grad"),
}


@dataclass(frozen=True)
class Heat:
    """Maps of L layers, in model order, by T steps that hold whole vectors.

    Attributes:
        layers: the L names.
        steps: (T,) int64.
        values: (L, T) float64 of each map in `MAPS`; NaN where there is nothing to say. Over a layer's channels:
            "spread", the standard deviation of the batch mean from batch to batch, in standard deviations of the
            batch, from the change since the step before with whole vectors: median |change| / (sqrt(2) 0.6745 std);
            "gamma", the median of |gamma|; "drift", the median of |running mean - batch mean| / std;
            "gradient", the root of the mean square of dL/dgamma and dL/dbeta. std is sqrt(batch_var + eps).
        broken: (L, T) int64 of each map: how many values that it is made of were not finite.
        notes: what was left out, in words.
    """

    layers: list[str]
    steps: NDArray[np.int64]
    values: dict[str, NDArray[np.float64]]
    broken: dict[str, NDArray[np.int64]]
    notes: list[str] = field(default_factory=list)

    def rows(self, quantity: str) -> list[dict[str, Any]]:
        """Return the rows of the data set of one map: layer, index (model order), step, until, value, broken.

        A cell reaches from its step to `until`, the next; the last is as wide as the one before it.
        """
        ends = np.append(self.steps[1:], self.steps[-1:] + (np.diff(self.steps[-2:]) if len(self.steps) > 1 else 1))
        values, broken = self.values[quantity], self.broken[quantity]
        return [
            {
                "layer": name,
                "index": i,
                "step": int(step),
                "until": int(until),
                "value": float(values[i, t]) if np.isfinite(values[i, t]) else None,
                "broken": int(broken[i, t]),
            }
            for i, name in enumerate(self.layers)
            for t, (step, until) in enumerate(zip(self.steps, ends, strict=True))
        ]


def heat(run: Run, max_steps: int = MAX_STEPS, max_layers: int = MAX_LAYERS) -> Heat:
    """Return the maps of a run (of an experiment: of `run.main`), thinned evenly to so many steps and layers."""
    run = run.main
    infos = [run.layers[i] for i in thin(len(run.layers), max_layers)]
    kept = run.vectors(infos[0].name, "gamma")[0] if infos else np.empty(0, np.int64)
    both = np.flatnonzero(np.isin(kept, run.steps))  # a torn file can leave vectors without statistics
    at = both[thin(len(both), max_steps)] if len(both) else both
    steps = kept[at]
    notes = []
    if len(infos) < len(run.layers):
        notes.append(f"Map of layers: {len(infos)} of {len(run.layers):,}, evenly spaced in model order.")
    if len(at) < len(both):
        notes.append(f"Map of layers: {len(at)} of {len(both):,} steps that hold whole vectors, evenly spaced.")
    values = {name: np.full((len(infos), len(at)), np.nan) for name in MAPS}
    broken = {name: np.zeros((len(infos), len(at)), np.int64) for name in MAPS}
    rows = np.searchsorted(run.steps, steps)
    for i, info in enumerate(infos if len(at) else []):
        made = _layer(lambda quantity, at, name=info.name: run.vectors(name, quantity)[1][at], at, info.eps)
        counts = {q: np.nan_to_num(run.stats(info.name, q)[rows, NONFINITE]) for q in QUANTITIES}
        for name, quantities in MAPS.items():
            values[name][i] = made[name]
            broken[name][i] = sum(counts[q] for q in quantities)
    return Heat([info.name for info in infos], steps, values, broken, notes)


def _layer(
    vectors: Callable[[str, NDArray[np.int64]], NDArray[np.float32]], at: NDArray[np.int64], eps: float
) -> dict[str, NDArray[np.float64]]:
    """Return the rows of one layer; `vectors(quantity, at)` gives (T, C)."""

    def of(quantity: str, at: NDArray[np.int64] = at) -> NDArray[np.float64]:
        return vectors(quantity, at).astype(np.float64)

    before = np.maximum(at - 1, 0)
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        mean, std = of("batch_mean"), np.sqrt(of("batch_var") + eps)
        jump = np.abs(mean - of("batch_mean", before)) / std
        jump[at == before] = np.nan  # nothing came before the first
        pushes = np.concatenate([of("gamma_grad"), of("beta_grad")], axis=1)
        return {
            "spread": _median(jump) / (np.sqrt(2) * NORMAL_MEDIAN),
            "gamma": _median(np.abs(of("gamma"))),
            "drift": _median(np.abs(of("running_mean") - mean) / std),
            "gradient": np.sqrt(_mean(pushes**2)),
        }


def _median(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the median of each row's finite values; NaN where there is none."""
    ordered = np.sort(np.where(np.isfinite(values), values, np.nan), axis=1)  # NaN goes to the end
    count = np.isfinite(ordered).sum(1)
    row, middle = np.arange(len(values)), np.maximum(count - 1, 0)
    return (ordered[row, middle // 2] + ordered[row, (middle + 1) // 2]) / 2


def _mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the mean of each row's finite values; NaN where there is none."""
    finite = np.isfinite(values)
    return np.where(finite, values, 0).sum(1) / np.where(finite.any(1), finite.sum(1), np.nan)
