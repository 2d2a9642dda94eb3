"""The main chart with its data inside: for a notebook, or as a PNG."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runs.files import write_atomically
from .page import VEGA_LITE, first_look, require_charts
from .paper import paper_charts, paper_rows
from .select import select

if TYPE_CHECKING:
    from ..runs.reader import Run


def main_chart(run: Run, layer: str | None = None, channel: int = 0) -> Any:
    """Return the main chart of one channel: measured beside learned.

    Args:
        run: a run from `open_run`.
        layer: name of the layer; if not given, the channel that the page shows first.
        channel: which channel of that layer.
    Returns:
        An Altair chart: a notebook shows it, `chart.save("main.svg")` writes it.
    Raises:
        ValueError: the run holds no such layer or channel, or no step with whole vectors.
        ModuleNotFoundError: Altair or vl-convert is not installed.
    """
    require_charts()
    import altair as alt

    from . import charts

    selection = select(run, None if layer is None else (layer, channel))
    if not len(selection.steps):
        raise ValueError(f"{run.path} has no batch-norm layer with whole vectors recorded, so there is nothing to draw")
    index, place = selection.first
    view = selection.layers[index]
    step, probe = first_look(selection)
    rows = selection.probes(index, place)
    chart = charts.main(
        alt.NamedData("trace"),
        alt.NamedData("probes") if rows else None,
        subtitle=f"{run.path.name}: layer {view.info.name}, channel {view.channels[place]}",
        step=step,
        probe=probe,
    )
    chart.datasets = {"trace": selection.trace(index, place), "probes": rows}
    chart.config = charts.config(charts.LIGHT) | {"background": charts.LIGHT.surface}
    return chart


def paper_chart(run: Run) -> Any:
    """Return the figures of the experiment `paper`, side by side.

    Raises:
        ValueError: it is no such run, or not finished.
        ModuleNotFoundError: Altair or vl-convert is not installed.
    """
    require_charts()
    import altair as alt

    from . import charts

    rows = paper_rows(run)
    if not rows:
        raise ValueError(
            f"{run.path} is no finished run of batchnorm train --experiment paper, so there is nothing to draw"
        )
    titles = ("test accuracy", "input to a sigmoid, without batch norm", "input to a sigmoid, with batch norm")
    figures = [
        figure.properties(width=270, height=220, title=title)
        for figure, title in zip(paper_charts(rows).values(), titles, strict=True)
    ]
    chart = alt.hconcat(*figures)
    chart.datasets = {"paper": rows}
    chart.config = charts.config(charts.LIGHT) | {"background": charts.LIGHT.surface}
    return chart


def write_png(run: Run, out: str | os.PathLike[str], scale: float = 2) -> Path:
    """Write the main chart of a run as a PNG and return where it is; `scale` is in pixels a point."""
    chart = main_chart(run)
    import vl_convert

    path = Path(out)
    png = vl_convert.vegalite_to_png(chart.to_dict(validate=False), vl_version=VEGA_LITE, scale=scale)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, png)
    return path
