"""What a run recorded of a layer, as rules ask for it: NumPy only."""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..runs.reader import Run
from ..runs.schema import COLUMNS, LayerInfo
from .layer import Array, Layer, Settings

# So many of the last recorded vectors stand for the weights as they are at the end: enough to average the noise of a
# batch away, few enough for the weights not to have moved far.
LAST = 20
_NONFINITE = COLUMNS.index("nonfinite")
_EXTREMES = [COLUMNS.index("min"), COLUMNS.index("max")]


class Updates(NamedTuple):
    """Pairs of neighbouring steps: how far the running mean moved, and how far it was from the batch, both (P, C)."""

    moved: Array
    distance: Array


class History:
    """The history of one layer.

    Attributes:
        run: the run.
        info: the layer, as it was when the watching began.
    """

    def __init__(self, run: Run, info: LayerInfo) -> None:
        self.run, self.info = run, info
        self.steps = run.steps
        self.counts = run.counts(info.name)
        self.forwards = run.forwards(info.name)

    @property
    def has_vectors(self) -> bool:
        """Whether whole vectors were kept."""
        return bool(len(self.vectors("batch_mean")[0]))

    def vectors(self, quantity: str) -> tuple[NDArray[np.int64], Array]:
        """The steps that kept whole vectors, and these, float64."""
        steps, values = self.run.vectors(self.info.name, quantity)
        return steps, values.astype(np.float64)

    def last(self, quantity: str) -> Array | None:
        """The last vector of a quantity; None where it never existed."""
        values = self.run.vectors(self.info.name, quantity)[1]
        return values[-1].astype(np.float64) if len(values) and not np.isnan(values[-1]).all() else None

    def first_nonfinite(self, quantity: str) -> tuple[int, int] | None:
        """The first recorded step with a value that was not finite, and how many steps had one; None without any."""
        steps = self.steps[self.run.stats(self.info.name, quantity)[:, _NONFINITE] > 0]
        return (int(steps[0]), len(steps)) if len(steps) else None

    def largest(self, *quantities: str) -> float | None:
        """The largest absolute value that any of these had; None where none of them ever existed."""
        extremes = np.concatenate([self.run.stats(self.info.name, each)[:, _EXTREMES] for each in quantities])
        return None if np.isnan(extremes).all() else float(np.nanmax(np.abs(extremes)))

    @property
    def updates(self) -> int | None:
        """How many batches the running statistics have tracked; None unless they started as new within this run."""
        steps, running = self.vectors("running_mean")
        _, batch = self.vectors("batch_mean")
        if self.info.momentum is None or not len(steps) or steps[0] != 0 or self.steps[0] != 0 or not self.info.tracks:
            return None
        # After one batch a new layer's running mean is momentum * batch mean; one that had seen more is elsewhere.
        expected = self.info.momentum * batch[0]
        if not np.allclose(running[0], expected, rtol=1e-3, atol=1e-6):
            return None
        ran = self.forwards > 0
        return round(float(np.mean(ran)) * (int(self.steps[-1]) + 1)) if len(ran) else None

    @cached_property
    def pairs(self) -> Updates:
        """Pairs of neighbouring recorded steps with whole vectors, in units of the batch's standard deviation."""
        steps, running = self.vectors("running_mean")
        _, mean = self.vectors("batch_mean")
        _, var = self.vectors("batch_var")
        at = np.flatnonzero(np.diff(steps) == 1) + 1
        with np.errstate(invalid="ignore"):
            std = np.sqrt(var[at] + self.info.eps)
            moved, distance = (running[at] - running[at - 1]) / std, (mean[at] - running[at - 1]) / std
        good = np.isfinite(moved).all(1) & np.isfinite(distance).all(1)
        return Updates(moved[good], distance[good])

    @cached_property
    def recent(self) -> tuple[Array, Array, NDArray[np.int64]] | None:
        """Batch mean, batch variance, (K, C), and step of the last K recorded vectors that are finite; or None."""
        steps, mean = self.vectors("batch_mean")
        _, var = self.vectors("batch_var")
        good = np.flatnonzero(np.isfinite(mean).all(1) & np.isfinite(var).all(1))[-LAST:]
        return (mean[good], var[good], steps[good]) if len(good) >= LAST // 2 else None

    @cached_property
    def layer(self) -> Layer:
        """The layer as it stood at the last vector."""
        steps, _ = self.run.vectors(self.info.name, "gamma")
        info = self.info
        return Layer(
            info.name,
            *(self.last(quantity) for quantity in ("gamma", "beta", "running_mean", "running_var")),
            updates=self.updates,
            settings=Settings(info.kind, info.eps, info.momentum, info.tracks),
            step=int(steps[-1]) if len(steps) else None,
        )


def histories(run: Run) -> list[History]:
    """One of each layer; of an experiment of several arms, those of the arm to look at first."""
    run = run.main
    return [History(run, info) for info in run.layers] if len(run.steps) else []
