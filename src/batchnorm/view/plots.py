"""run.plot: the charts of the page, for a notebook."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .page import require_charts
from .picture import channel_chart, main_chart, on_paper

if TYPE_CHECKING:
    from ..runs.reader import Run

HALF = 400  # px: two of them fit into a notebook


class Plots:
    """The page's charts of a run, each an Altair chart that a notebook shows offline: `run.plot.learned("bn1")`.

    Of an experiment they show `run.main`. Those of one channel take a layer's name, if not given the layer and channel
    that the page shows first; and a channel's number, if not given the one of that layer which the page shows first.

    They raise a ValueError where the run holds no such layer or channel, or nothing to draw of it, and a
    ModuleNotFoundError where Altair or vl-convert is not installed (`pip install "batchnorm[report]"`).
    """

    def __init__(self, run: Run) -> None:
        self._run = run

    def __repr__(self) -> str:
        return f"Plots of {self._run!r}: main, measured, learned, running, gradients, health"

    def main(self, layer: str | None = None, channel: int | None = None) -> Any:
        """Return measured beside learned: the page's first screen."""
        return main_chart(self._run, layer, channel)

    def measured(self, layer: str | None = None, channel: int | None = None) -> Any:
        """Return what came in: mean ± std of every batch, and the running mean."""
        from .charts import panels

        return self._channel(
            layer, channel, panels.MEASURED, lambda trace, probes: [panels.measured(trace, probes, width=700)]
        )

    def learned(self, layer: str | None = None, channel: int | None = None) -> Any:
        """Return what goes out: beta ± |gamma|, step by step."""
        from .charts import panels

        return self._channel(
            layer,
            channel,
            panels.LEARNED,
            lambda trace, probes: [panels.learned(trace, probes, width=700)],
            needs="affine",
        )

    def running(self, layer: str | None = None, channel: int | None = None) -> Any:
        """Return the running mean and variance, which average those of the batches."""
        from . import charts

        return self._channel(
            layer,
            channel,
            ("Running against batch", "Dots are measured, one batch each. The dashes only average them."),
            lambda trace, _: [charts.running_mean(trace, width=HALF), charts.running_variance(trace, width=HALF)],
            needs="tracks",
        )

    def gradients(self, layer: str | None = None, channel: int | None = None) -> Any:
        """Return the gradients that move gamma and beta."""
        from . import charts

        return self._channel(
            layer,
            channel,
            ("What moves γ and β: their gradients",),
            lambda trace, _: [charts.gradients(trace, q, width=HALF) for q in ("gamma_grad", "beta_grad")],
            needs="affine",
        )

    def health(self, quantity: str = "drift") -> Any:
        """Return a map of layers by steps, crossed where a value was not finite.

        At most 60 layers and 200 steps that hold whole vectors, evenly spaced; the subtitle says what was left out.

        Args:
            quantity: "drift", the running mean's distance from the batch mean; "spread", how far batch means lie apart;
                both in standard deviations of the batch; "gamma", the median |gamma|; "gradient", the size of dL/dgamma
                and dL/dbeta. What each is exactly: `batchnorm.view.heat.Heat`.
        """
        require_charts()
        import altair as alt

        from . import charts
        from .heat import MAPS, heat

        if quantity not in MAPS:
            raise ValueError(f"quantity must be one of {', '.join(MAPS)}, got {quantity!r}")
        found = heat(self._run)
        if not len(found.steps):
            raise ValueError(f"{self._run.path} has no step with whole vectors recorded, so there is nothing to draw")
        chart = charts.heat(alt.NamedData("heat"), quantity)
        title = alt.TitleParams("Every layer, step by step", subtitle=[self._run.path.name, *found.notes])
        step = int(found.steps[-1])
        return charts.OfflineChart(
            hconcat=[chart],
            title=title,
            datasets={"heat": found.rows(quantity)},
            config=on_paper(),
            padding=charts.PADDING,
        ).add_params(*charts.parameters(step, step)[:1])

    def _channel(
        self, layer: str | None, channel: int | None, title: Sequence[str], make: Any, needs: str | None = None
    ) -> Any:
        return channel_chart(self._run, layer, channel, title, make, needs=needs)
