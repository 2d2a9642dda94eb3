"""The page's charts of one channel with their data inside: for a notebook, or as a PNG."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runs.files import write_atomically
from .page import VEGA_LITE, require_charts
from .paper import paper_charts, paper_rows
from .payload import first_look
from .select import select

if TYPE_CHECKING:
    from ..runs.reader import Run


def main_chart(run: Run, layer: str | None = None, channel: int | None = 0) -> Any:
    """Return the main chart of one channel: measured beside learned.

    Args:
        run: a run from `open_run`.
        layer: name of the layer; if not given, the channel that the page shows first.
        channel: which channel of that layer; None for the one that the page would show first.
    Returns:
        An Altair chart: a notebook shows it, `chart.save("main.svg")` writes it.
    Raises:
        ValueError: the run holds no such layer or channel, or no step with whole vectors.
        ModuleNotFoundError: Altair or vl-convert is not installed.
    """
    from .charts.panels import HEADLINE, both

    return channel_chart(run, layer, channel, [HEADLINE], both, fontSize=22)


def channel_chart(
    run: Run,
    layer: str | None,
    channel: int | None,
    title: Sequence[str],
    make: Callable[[Any, Any], list[Any]],
    *,
    needs: str | None = None,
    **look: Any,
) -> Any:
    """Return charts of one channel side by side, with its data inside.

    Args:
        run: a run from `open_run`.
        layer: as in `main_chart`.
        channel: as in `main_chart`.
        title: stands above them, its further lines smaller; below it the run, layer and channel.
        make: `make(trace, probes)` returns the charts; `probes` is None where none were recorded.
        needs: "affine" or "tracks": what the layer must have for there to be anything to draw.
        look: of the title.
    Raises:
        ValueError: as in `main_chart`; or the layer has not what it needs.
    """
    require_charts()
    import altair as alt

    from . import charts

    selection = select(run, None if layer is None else (layer, channel))
    if not len(selection.steps):
        raise ValueError(f"{run.path} has no batch-norm layer with whole vectors recorded, so there is nothing to draw")
    index, place = selection.first
    view = selection.layers[index]
    if needs and not getattr(view.info, needs):
        lacks = {"affine": "affine=False: it has no gamma and beta", "tracks": "no running statistics: it tracks none"}
        raise ValueError(f"layer {view.info.name!r} of {run.path} has {lacks[needs]}, so there is nothing to draw")
    rows = selection.probes(index, place)
    which = f"{run.path.name}: layer {view.info.name}, channel {view.channels[place]}"
    return charts.OfflineChart(
        hconcat=make(alt.NamedData("trace"), alt.NamedData("probes") if rows else None),
        spacing=40,
        title=alt.TitleParams(title[0], subtitle=[*title[1:], which], **look),
        datasets={"trace": selection.trace(index, place), "probes": rows},
        config=on_paper(),
        padding=charts.PADDING,
    ).add_params(*charts.parameters(*first_look(selection)))


def on_paper() -> Any:
    """Return the configuration of a chart that stands alone: light, on a ground of its own."""
    from . import charts

    return charts.config(charts.LIGHT) | {"background": charts.LIGHT.surface}


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
