"""Layers by steps: one cell a layer and recorded step, the fuller the larger; crossed where a value was not finite."""

from __future__ import annotations

from typing import Any

import altair as alt

from .panels import cursor, x_step

# quantity of view.heat: the role whose color it has, what a cell says, and its scale
MAPS: dict[str, tuple[str, str, Any]] = {
    "spread": ("measured", "std of the batch mean from batch to batch, in standard deviations of the batch", "sqrt"),
    "gamma": ("learned", "median of |γ| over the channels", "linear"),
    "drift": ("tracked", "running mean from batch mean, in standard deviations of the batch", "sqrt"),
    "gradient": ("gradient", "size of ∂L/∂γ and ∂L/∂β, root of the mean square", "sqrt"),
}


def heat(data: alt.Data, quantity: str, *, width: int = 900, row: int = 16) -> Any:
    """Return the map of one quantity, "spread", "gamma", "drift" or "gradient", with layers in model order.

    `data` has a row a cell, as `view.heat.Heat.rows` gives them: layer, index, step, until, value, broken. The
    parameter `step` puts a line at the chosen step.
    """
    role, title, kind = MAPS[quantity]
    order = alt.EncodingSortField("index", op="min")
    y = alt.Y("layer:N", title=None, sort=order, axis=alt.Axis(labelLimit=190, grid=False), scale=alt.Scale(padding=0))
    base = alt.Chart(data)
    scale = alt.Scale(type=kind, range=[0.04, 1], zero=True)
    tooltip = ["layer:N", "step:Q", alt.Tooltip("value:Q", format=".3g"), alt.Tooltip("broken:Q", title="not finite")]
    legend = alt.Legend(title=title, titleLimit=600, symbolType="square", tickCount=4, format=".2~g")
    x = x_step()
    cells = base.mark_rect(style=f"{role}-cell").encode(
        x=x, x2="until:Q", y=y, tooltip=tooltip, opacity=alt.Opacity("value:Q", scale=scale, legend=legend)
    )
    cross = base.transform_filter("datum.broken > 0").transform_calculate(middle="(datum.step + datum.until) / 2")
    crossed = cross.mark_point(style="broken-cell").encode(x=alt.X("middle:Q"), y=y, tooltip=tooltip)
    return alt.layer(cells, crossed, cursor()).properties(width=width, height=alt.Step(row))
