"""Charts of several runs in one: what was logged, and where each layer's numbers ended."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import altair as alt

from .panels import level, y_axis

ROW = 13  # px: a run's line within a layer's


def logged(data: alt.Data, names: Sequence[str], *, width: int = 520, height: int = 220) -> Any:
    """Return a panel for each logged number, a line a run over the steps.

    `data` has a row a run, name and step: run, order, name, step, value.
    """
    return alt.hconcat(*(_curve(data, name, width, height) for name in names), spacing=30)


def _curve(data: alt.Data, name: str, width: int, height: int) -> Any:
    base = alt.Chart(data).transform_filter(alt.datum.name == name)
    y = alt.Y("value:Q", title=None, scale=alt.Scale(zero=False), axis=y_axis())
    x = alt.X("step:Q", title="training step", scale=alt.Scale(nice=False))
    line = base.mark_line(strokeWidth=1.8).encode(x=x, y=y, color=_by_run(), strokeDash=_dashes())
    return line.properties(width=width, height=height, title=alt.Title(name))


def ends(data: alt.Data, layers: Sequence[str], runs: int, quantities: Sequence[str], *, width: int = 430) -> Any:
    """Return a panel for each quantity, a line a layer, and in it a mark a run: the value, and its range if it has one.

    `data` has a row a run, layer and quantity: run, order, layer, index (model order), quantity, title, value, lo, hi.
    """
    panels = [_ends(data, layers, runs, name, width, i == 0) for i, name in enumerate(quantities)]
    return alt.hconcat(*panels, spacing=24)


START = {"gamma": 1.0, "beta": 0.0}
TITLES = {
    "gamma": "γ at the end: median and middle 90 % of the channels",
    "beta": "β at the end: median and middle 90 % of the channels",
    "spread": "Batch means differ by, in std of the batch",
    "drift": "Running mean from batch mean, in std of the batch",
}


def _ends(data: alt.Data, layers: Sequence[str], runs: int, quantity: str, width: int, named: bool) -> Any:
    base = alt.Chart(data).transform_filter(alt.datum.quantity == quantity)
    y = alt.Y("layer:N", title=None, sort=list(layers), axis=alt.Axis(labels=named, labelLimit=190, grid=True))
    offset = alt.YOffset("order:O", scale=alt.Scale(paddingOuter=0.4))
    x = alt.X("value:Q", title=None, scale=alt.Scale(zero=quantity not in START), axis=y_axis(grid=True))
    marks = base.encode(y=y, yOffset=offset, color=_by_run())
    height = alt.Step(ROW, **{"for": "offset"}) if runs > 1 else alt.Step(2 * ROW)
    parts = [
        marks.mark_rule(strokeWidth=2, opacity=0.6).encode(x=alt.X("lo:Q"), x2="hi:Q"),
        marks.mark_point(filled=True, size=45, opacity=1).encode(
            x=x, shape=alt.Shape("run:N", sort=_order(), legend=None)
        ),
    ]
    if quantity in START:
        parts.insert(0, level(START[quantity], upright=True))
    return alt.layer(*parts).properties(width=width, height=height, title=alt.Title(TITLES[quantity], fontSize=13))


def _order() -> Any:
    return alt.EncodingSortField("order", op="min")


def _by_run() -> Any:
    return alt.Color("run:N", sort=_order())


def _dashes() -> Any:
    return alt.StrokeDash("run:N", sort=_order())
