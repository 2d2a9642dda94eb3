"""The chart of what was logged under one name: a loss, an accuracy, a learning rate."""

from __future__ import annotations

from typing import Any

import altair as alt

from .panels import broken, cursor, x_step, y_axis


def logged(data: alt.Data, *, width: int = 560, height: int = 150) -> Any:
    """Return logged values over the steps; a cross at the foot where one was not finite.

    `data` has a row a value: step, value, broken ("logged" where the value is null because it was not finite).
    """
    base = alt.Chart(data).encode(x=x_step())
    y = alt.Y("value:Q", title=None, axis=y_axis(), scale=alt.Scale(zero=False))
    return alt.layer(
        base.mark_line(style="logged-line").encode(y=y, tooltip=["step:Q", alt.Tooltip("value:Q", format=".4g")]),
        broken(data, "logged"),
        cursor(),
    ).properties(width=width, height=height)
