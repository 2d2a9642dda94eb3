"""Charts that compare the arms of an experiment: γ and β learned, fixed, one pair a batch, no batch norm."""

from __future__ import annotations

from typing import Any

import altair as alt


def arms_curves(data: alt.Data, *, width: int = 560, height: int = 240) -> Any:
    """Return test accuracy over the steps, a line an arm, each named at its end.

    `data` has a row an arm and evaluation: arm, order, step, test_accuracy.
    """
    order = alt.EncodingSortField("order", op="min")
    base = alt.Chart(data).encode(
        x=alt.X("step:Q", title="training step"),
        y=alt.Y("test_accuracy:Q", title="test accuracy", axis=alt.Axis(format=".0%"), scale=alt.Scale(zero=False)),
        color=alt.Color("arm:N", sort=order),
        strokeDash=alt.StrokeDash("arm:N", sort=order),
    )
    return (
        base.mark_line(strokeWidth=2, point=alt.OverlayMarkDef(size=18))
        .encode(tooltip=["arm:N", "step:Q", alt.Tooltip("test_accuracy:Q", format=".2%")])
        .properties(width=width, height=height)
    )


def arms_final(data: alt.Data, pairs: alt.Data, *, width: int = 560, height: int = 240) -> Any:
    """Return each arm's final test accuracy as a dot, with what chance may do to it; a tick for every single pair.

    `data` has a row an arm: arm, order, test_accuracy, lo, hi. `pairs` has a row a pair: arm, order, test_accuracy.
    """
    order = alt.EncodingSortField("order", op="min")
    y = alt.Y("arm:N", title=None, sort=order, axis=alt.Axis(labelFontSize=13, grid=False))
    # Dots, not bars: accuracies lie close together, and a bar must begin at zero.
    scale, axis = alt.Scale(zero=False, padding=12), alt.Axis(format=".1~%", grid=True)
    x = alt.X("test_accuracy:Q", title="final test accuracy", axis=axis, scale=scale)
    words = alt.Chart(data).encode(x=x, y=y)
    base = words.encode(color=alt.Color("arm:N", sort=order, legend=None))
    return alt.layer(
        base.mark_rule(style="chance").encode(x="lo:Q", x2="hi:Q"),
        alt.Chart(pairs).mark_tick(style="pairs", size=24).encode(x="test_accuracy:Q", y=y),
        base.mark_circle(size=130, opacity=1).encode(tooltip=["arm:N", alt.Tooltip("test_accuracy:Q", format=".2%")]),
        words.mark_text(style="over").encode(text=alt.Text("test_accuracy:Q", format=".1%")),
    ).properties(width=width, height=height)
