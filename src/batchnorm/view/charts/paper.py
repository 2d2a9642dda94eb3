"""The two figures of Ioffe & Szegedy 2015, section 4.1, from a run: accuracy, and what reaches a sigmoid."""

from __future__ import annotations

from typing import Any

import altair as alt

# Blue is not among them: the input to a sigmoid is what batch norm gives out, not what it measures.
_LINES = {"learned": ("with batch norm", "learned-line"), "none": ("without batch norm", "tracked")}
_BANDS = {"learned": "learned-band", "none": "tracked-band"}


def paper_accuracy(data: alt.Data, *, width: int = 560, height: int = 240) -> Any:
    """Return test accuracy over the steps, with batch norm and without: figure 1 (a).

    `data` has a row a test and arm: arm, step, test_accuracy.
    """
    lines = [
        alt.Chart(data)
        .mark_line(style=style)
        .transform_filter(alt.datum.arm == arm)
        .encode(
            x=alt.X("step:Q", title="training step"),
            y=alt.Y("test_accuracy:Q", title="test accuracy", axis=alt.Axis(format=".0%"), scale=alt.Scale(zero=False)),
            tooltip=["arm:N", "step:Q", alt.Tooltip("test_accuracy:Q", format=".2%")],
        )
        for arm, (_, style) in _LINES.items()
    ]
    # Each name on its side of its line, so that they are apart where the lines meet.
    sides = {"learned": {"baseline": "bottom", "dy": -4}, "none": {"baseline": "top", "dy": 8}}
    names = [
        alt.Chart(data)
        .mark_text(align="right", **sides[arm])
        .transform_filter(alt.datum.arm == arm)
        .transform_joinaggregate(last="max(step)")
        .transform_filter("datum.step === datum.last")
        .encode(x="step:Q", y="test_accuracy:Q", text=alt.value(name))
        for arm, (name, _) in _LINES.items()
    ]
    return alt.layer(*lines, *names).properties(width=width, height=height)


def paper_input(data: alt.Data, arm: str, limits: tuple[float, float], *, width: int = 560, height: int = 240) -> Any:
    """Return the 15th, 50th and 85th percentile of what reaches a sigmoid, over the steps, of one arm: figure 1 (b, c).

    Args:
        data: a row a test and arm: arm, step, p15, p50, p85.
        arm: "learned" or "none".
        limits: of the y-axis, which both arms share.
    """
    about = {"title": "input to the sigmoid", "scale": alt.Scale(domain=list(limits), nice=True)}
    base = alt.Chart(data).transform_filter(alt.datum.arm == arm).encode(x=alt.X("step:Q", title="training step"))
    line = _LINES[arm][1]
    tooltip = ["step:Q", *(alt.Tooltip(f"{name}:Q", format=".2f") for name in ("p15", "p50", "p85"))]
    return alt.layer(
        base.mark_area(style=_BANDS[arm]).encode(y=alt.Y("p15:Q", **about), y2="p85:Q"),
        base.mark_line(style=line).encode(y=alt.Y("p50:Q", **about), tooltip=tooltip),
    ).properties(width=width, height=height)
