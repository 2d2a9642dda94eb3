"""What the sections below the first screen show: gathered once, then handed to templates, charts and scripts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .answers import Answer, answers
from .cubes import Cube, cubes
from .facts import BELOW, NEAR_ZERO, plural
from .heat import MAPS, Heat, heat
from .histograms import Histograms, histograms
from .logged import Logged, logged
from .look import Look, look_at
from .nested import Nested, nested
from .select import pack
from .strip import Strips, strips
from .worked import worked

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..runs.reader import Run
    from .select import Selection

HEAT_STEPS = 80


@dataclass(frozen=True)
class Below:
    """What the page shows below its first screen.

    Attributes:
        logged: what the user's own training logged; `unshown` counts further names.
        strips: γ and β of all channels at a few steps.
        look: the numbers of the channel at which the page opens; None without whole vectors.
        answers: to what learners ask.
        worked: for each layer the steps that can be checked by hand, see `worked`.
        heat: the maps of layers by steps.
        histograms: of the shown channels' values in the probe batches.
        nested: experiments within the run's folder.
    """

    logged: list[Logged]
    unshown: int
    strips: Strips
    look: Look | None
    answers: list[Answer]
    worked: list[dict[str, Any] | None]
    heat: Heat
    histograms: Histograms
    nested: list[Nested]

    @property
    def cubes(self) -> list[Cube]:
        """The drawings of which numbers share a mean."""
        return cubes()

    @property
    def shares_here(self) -> str:
        """How many means the layer has at which the page opens, and over how many values each."""
        if self.look is None:
            return ""
        size, count = self.look.info.channels, self.look.count
        means = f"Layer {self.look.info.name or '(the model itself)'}: C = {size:,}, so {plural(size, 'mean')}"
        values = f", each over N·S = {plural(count, 'value')} (step {self.look.step:,})" if count > 0 else ""
        return f"{means}{values}."

    def specs(self) -> dict[str, Any]:
        """Return the charts, by the name of their place in the templates."""
        import altair as alt

        from .charts.heat import heat as heat_chart
        from .charts.histograms import histograms as histograms_chart
        from .charts.logged import logged as logged_chart
        from .charts.panels import parameters
        from .charts.strip import strip

        step, batch, *_ = parameters(0, 0)
        names = [f"logged_{i}" for i in range(len(self.logged))]
        charts = {name: logged_chart(alt.NamedData(name)).add_params(step) for name in names}
        if self.histograms:
            for name, role in (("spread_in", "measured"), ("spread_out", "learned")):
                charts[name] = histograms_chart(alt.NamedData(name), role).add_params(batch)
        if any(self.strips.layers):
            charts["strip"] = strip(alt.NamedData("strip"))
        if len(self.heat.steps):
            row = 16 if len(self.heat.layers) <= 30 else 11
            for name in MAPS:
                chart = heat_chart(alt.NamedData(f"heat_{name}"), name).properties(height=row * len(self.heat.layers))
                charts[f"heat_{name}"] = chart.add_params(step)
        return {name: chart.to_dict(validate=False) for name, chart in charts.items()}

    def payload(self) -> dict[str, Any]:
        """Return the data of the page's scripts."""
        layers = [
            each
            and {
                "channels": each.channels.tolist(),
                "gamma": pack(each.gamma),
                "beta": pack(each.beta),
                "near_zero": each.near_zero.tolist(),
                "shut": each.shut.tolist(),
            }
            for each in self.strips.layers
        ]
        return {
            "worked": self.worked,
            "histograms": self.histograms.payload(),
            "heat": {
                "layers": self.heat.layers,
                "steps": self.heat.steps.tolist(),
                "maps": {
                    name: {
                        "values": pack(self.heat.values[name].astype(np.float32)),
                        "broken": _sparse(self.heat.broken[name]),
                    }
                    for name in MAPS
                },
            },
            "logged": [series.rows() for series in self.logged],
            "strip": {"steps": self.strips.steps.tolist(), "layers": layers, "near_zero": NEAR_ZERO, "below": BELOW},
        }


def below(run: Run, selection: Selection, look: int) -> Below:
    """Return what the page shows below its first screen.

    Args:
        run: a run or an experiment.
        selection: what the first screen shows of it.
        look: the step at which the page opens.
    """
    seen = look_at(selection, look)
    return Below(
        *logged(run),
        strips(selection, look),
        seen,
        answers(selection.run, seen),
        worked(selection) if len(selection.steps) else [],
        heat(run, HEAT_STEPS),
        histograms(selection),
        nested(run),
    )


def _sparse(counts: NDArray[np.int64]) -> dict[int, int]:
    """Return the counts that are not 0, by their place row by row: most are."""
    flat = counts.ravel()
    return {int(i): int(flat[i]) for i in np.flatnonzero(flat)}
