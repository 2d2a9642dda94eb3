"""The numbers of the channel and step at which the page opens, in float64: what its answers are computed from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .select import nearest

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..runs.schema import LayerInfo
    from .select import Selection


@dataclass(frozen=True)
class Look:
    """One channel at one step.

    Attributes:
        info: its layer.
        channel, step: which.
        count: values a channel in the batch; -1 or 0 where that is not known.
        mean, var: of the batch; the variance is the biased one.
        running_mean, running_var, gamma, beta: NaN where the layer has none.
        next_mean, next_var, next_step: of the next step that the page shows, or the one before at the end; NaN and None
            if there is only one.
        first, last: (gamma, beta) at the first and the last step that the page shows.
        probe_means, probe_vars: (B,) of other batches with the weights of this step; empty without.
    """

    info: LayerInfo
    channel: int
    step: int
    count: int
    mean: float
    var: float
    running_mean: float
    running_var: float
    gamma: float
    beta: float
    next_mean: float
    next_var: float
    next_step: int | None
    first: tuple[float, float]
    last: tuple[float, float]
    probe_means: NDArray[np.float64]
    probe_vars: NDArray[np.float64]

    @property
    def where(self) -> str:
        """The place in words."""
        return f"layer {self.info.name or '(the model itself)'}, channel {self.channel}, step {self.step:,}"


def look_at(selection: Selection, step: int) -> Look | None:
    """Return the numbers of the channel that the page opens at; None where no step holds whole vectors."""
    if not len(selection.steps):
        return None
    index, place = selection.first
    view, at = selection.layers[index], nearest(selection.steps, step)
    columns = {q: values[:, place].astype(np.float64).tolist() for q, values in view.columns.items()}
    other = at + 1 if at + 1 < len(selection.steps) else at - 1
    none = float("nan")
    probes = {}
    for q, values in view.probes.items():
        there = selection.probe_steps == selection.steps[at]
        of_step = values[there][:, :, place].astype(np.float64).ravel()
        probes[q] = of_step[np.isfinite(of_step)]
    return Look(
        info=view.info,
        channel=int(view.channels[place]),
        step=int(selection.steps[at]),
        count=int(view.counts[at]),
        mean=columns["batch_mean"][at],
        var=columns["batch_var"][at],
        running_mean=columns["running_mean"][at],
        running_var=columns["running_var"][at],
        gamma=columns["gamma"][at],
        beta=columns["beta"][at],
        next_mean=columns["batch_mean"][other] if other >= 0 else none,
        next_var=columns["batch_var"][other] if other >= 0 else none,
        next_step=int(selection.steps[other]) if other >= 0 else None,
        first=(columns["gamma"][0], columns["beta"][0]),
        last=(columns["gamma"][-1], columns["beta"][-1]),
        probe_means=probes["batch_mean"],
        probe_vars=probes["batch_var"],
    )
