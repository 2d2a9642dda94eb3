"""Histograms of a channel's values in several batches, coming in and going out."""

from __future__ import annotations

from typing import Any

import altair as alt

from .panels import y_axis

TITLES = {"measured": "value of the channel, coming in", "learned": "value of the channel, going out"}


def histograms(data: alt.Data, role: str, *, width: int = 560, height: int = 230) -> Any:
    """Return a histogram for each batch, one above the other, coming in ("measured") or going out ("learned").

    `data` has a row a bin's left edge: batch (1, 2, ...), value (the edge), floor and top (where the batch's histogram
    stands, and how high it is there), middle (the batch's mean). The parameter `batch` makes that batch stand out.
    """
    x = alt.X("value:Q", title=TITLES[role], axis=y_axis(), scale=alt.Scale(nice=False, zero=False))
    label = "datum.value <= -1 ? 'batch ' + -datum.value : ''"
    axis = alt.Axis(labelExpr=label, tickMinStep=1, grid=False, title=None, format="d")
    y = alt.Y("top:Q", axis=axis, scale=alt.Scale(nice=False, zero=False))
    is_chosen = "batch === 0 || datum.batch === batch"
    base = alt.Chart(data).encode(detail="batch:N")
    pale, strong = (alt.condition(is_chosen, alt.value(on), alt.value(off)) for on, off in ((0.5, 0.2), (1, 0.35)))
    middles = base.transform_aggregate(value="mean(middle)", floor="min(floor)", top="max(floor)", groupby=["batch"])
    middles = middles.transform_calculate(top="datum.floor + 0.95")
    tooltip = ["batch:O", alt.Tooltip("value:Q", format=".3g")]
    return alt.layer(
        base.mark_area(style=f"{role}-band", interpolate="step-after", line=False).encode(
            x=x, y=y, y2="floor:Q", opacity=pale
        ),
        middles.mark_rule(style=f"{role}-reach").encode(
            x="value:Q", y="floor:Q", y2="top:Q", opacity=strong, tooltip=tooltip
        ),
    ).properties(width=width, height=height)
