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
# Recorded steps without train mode: at least so many, and such a share of the run.
LEAST, ASLEEP = 5, 0.05
ORDERED = 100  # the last vectors that tell whether the data are shuffled
_NONFINITE = COLUMNS.index("nonfinite")
_EXTREMES = [COLUMNS.index("min"), COLUMNS.index("max")]


class Updates(NamedTuple):
    """Pairs of neighboring steps: how far the running mean moved, and how far it was from the batch, both (P, C)."""

    moved: Array
    distance: Array


class Order(NamedTuple):
    """How batch means vary over neighboring steps: by chance, if the data are shuffled, or along an order.

    Attributes:
        steps: how many.
        ratio: of their variance, less a smooth drift, to that of neighbors; 1 of shuffled batches.
        spread: their standard deviation in standard deviations of the data.
    """

    steps: int
    ratio: float
    spread: float


class History:
    """The history of one layer.

    Attributes:
        run: the run.
        info: the layer, as it was when the watching began.
        first: the history of the layer nearest to the data; itself of that one.
    """

    def __init__(self, run: Run, info: LayerInfo, first: History | None = None) -> None:
        self.run, self.info, self.first = run, info, first or self
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
        if self.asleep is not None or not self.info.tracks:
            return None
        if self.info.momentum is None or not len(steps) or steps[0] != 0 or self.steps[0] != 0:
            return None
        # After one batch a new layer's running mean is momentum * batch mean; one that had seen more is elsewhere.
        expected = self.info.momentum * batch[0]
        if not np.allclose(running[0], expected, rtol=1e-3, atol=1e-6):
            return None
        ran = self.forwards > 0
        return round(float(np.mean(ran)) * (int(self.steps[-1]) + 1)) if len(ran) else None

    @cached_property
    def asleep(self) -> tuple[int, int] | None:
        """The longest time for which the layer, after training, did not run in train mode, though it had gradients.

        Returns:
            Its first step, and how many recorded ones; None where there is none worth a word.
        """
        ran = self.forwards > 0
        slept = ~ran & (np.cumsum(ran) > 0)
        edges = np.flatnonzero(np.diff(np.concatenate([[False], slept, [False]]).astype(int)))
        begins, ends = edges[::2], edges[1::2]
        if not len(begins):
            return None
        longest = int(np.argmax(ends - begins))
        begin, end = int(begins[longest]), int(ends[longest])
        gradients = self.run.stats(self.info.name, "gamma_grad")[begin:end, _NONFINITE]
        if end - begin < max(LEAST, ASLEEP * len(ran)) or np.isnan(gradients).all():
            return None  # without gradients it is frozen, on purpose
        return int(self.steps[begin]), end - begin

    @cached_property
    def order(self) -> Order | None:
        """Of the last vectors, if these are of neighboring steps."""
        steps, mean = self.vectors("batch_mean")
        _, var = self.vectors("batch_var")
        steps, mean, var = steps[-ORDERED:], mean[-ORDERED:], var[-ORDERED:]
        if len(steps) < ORDERED // 2 or (np.diff(steps) != 1).any():
            return None
        if not (np.isfinite(mean).all() and np.isfinite(var).all()):
            return None
        points = mean / np.sqrt(var.mean(0) + self.info.eps)
        time = np.linspace(-1, 1, len(points))[:, None]
        powers = np.hstack([np.ones_like(time), time, time**2])
        rest = points - powers @ np.linalg.lstsq(powers, points, rcond=None)[0]
        apart = np.diff(points, axis=0) ** 2
        ratio = float((rest**2).mean() / max(apart.mean() / 2, 1e-30))
        return Order(len(points), ratio, float(np.sqrt((rest**2).mean())))

    @cached_property
    def pairs(self) -> Updates:
        """Pairs of neighboring recorded steps with whole vectors, in units of the batch's standard deviation."""
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
    if not len(run.steps):
        return []
    found: list[History] = []
    first = None
    for info in run.layers:
        found.append(History(run, info, first))
        if first is None and found[-1].forwards.any():
            first = found[-1]
    return found
