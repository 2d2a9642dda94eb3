"""The channel strip: all channels of a layer at one step, sorted by |γ|, with the zone in which a channel is dead."""

from __future__ import annotations

from typing import Any

import altair as alt

from ..facts import NEAR_ZERO
from .panels import level, y_axis

SHAPES = {"": "circle", "|γ| near 0": "cross", "shut by a ReLU": "triangle-down"}


def strip(data: alt.Data, *, width: int = 1180) -> Any:
    """Return |γ| above β, a mark a channel, from the smallest |γ| to the largest.

    `data` has a row a channel: rank, channel, gamma, beta, size (|γ|), dead (a key of `SHAPES`), place (among the
    channels of the first screen; -1 for none), chosen. The scale of |γ| is linear below the edge of the dead zone and
    logarithmic above, so that 0 is on it.
    """
    zone = alt.Chart(alt.Data(values=[{"lo": 0, "hi": NEAR_ZERO}])).mark_rect(style="dead-zone")
    scale = alt.Scale(type="symlog", constant=NEAR_ZERO, domainMin=0)
    ticks = alt.Axis(values=[0, 0.001, 0.01, 0.1, 1, 10, 100, 1e3, 1e6, 1e12, 1e20], format="~g")
    top = alt.Y("size:Q", title="|γ|", axis=ticks, scale=scale)
    foot = alt.Y("beta:Q", title="β", axis=y_axis(tickCount=4))
    upper = alt.layer(zone.encode(y="lo:Q", y2="hi:Q"), *_marks(data, top, None)).properties(width=width, height=150)
    lower = alt.layer(level(0), *_marks(data, foot, "channels, from the smallest |γ| to the largest"))
    return alt.vconcat(upper, lower.properties(width=width, height=100), spacing=12)


def _marks(data: alt.Data, y: alt.Y, title: str | None) -> list[alt.Chart]:
    """Return a line at the chosen channel, and a mark a channel."""
    base = alt.Chart(data).encode(x=alt.X("rank:Q", title=title, axis=alt.Axis(tickMinStep=1)))
    numbers = [alt.Tooltip(f"{name}:Q", format=".4g") for name in ("gamma", "beta")]
    shapes = alt.Scale(domain=list(SHAPES), range=list(SHAPES.values()))
    marks = base.mark_point(style="channel").encode(
        y=y,
        tooltip=["channel:Q", *numbers, "dead:N"],
        shape=alt.Shape("dead:N", legend=None, scale=shapes),
        opacity=alt.condition("datum.place >= 0", alt.value(1), alt.value(0.55)),
        size=alt.condition("datum.chosen", alt.value(180), alt.value(40)),
    )
    return [base.transform_filter("datum.chosen").mark_rule(style="cursor"), marks]
