"""The main chart: what a batch brings in (measured) beside what goes out (learned), step for step.

Data sets, one row a recorded step or a probe batch of one channel:
    trace   step, batch_mean, batch_var, running_mean, running_var, gamma, beta, gamma_grad, beta_grad, broken
    probes  step, batch (1, 2, ...), batch_mean, batch_var, gamma, beta
A value that was not finite is null and leaves a gap; `broken` names those ("measured learned gradient"), and a cross
at the foot of the panel shows them.
Parameters that the reader moves: `step`, `batch` (0: the training batch; k: the k-th probe batch), `probe` (the
step whose probe batches are shown); `would_lo`, `would_mid`, `would_hi`: what would go out with another γ and β,
or in eval (null: nothing to show).
"""

from __future__ import annotations

from typing import Any

import altair as alt

HEADLINE = "Each batch is measured. Gamma and beta are learned."
MEASURED = (
    "What came in: this batch’s mean ± std.",
    "Measured anew on every batch. Dashes: the running mean, kept for eval; averaged, not learned.",
)
LEARNED = (
    "What goes out: β ± |γ|.",
    "Learned: each step starts from the last value and moves by its gradient. Dots: starts at 0 ± 1.",
)

STRIP = 140  # px: the strip of probe batches beside each panel
WOULD = ("would_lo", "would_mid", "would_hi")


def parameters(step: int, probe: int) -> tuple[alt.Parameter, ...]:
    """Return what the reader moves, with their first values."""
    return (
        alt.param(name="step", value=step),
        alt.param(name="batch", value=0),
        alt.param(name="probe", value=probe),
        *(alt.param(name=name, value=None) for name in WOULD),
    )


def cursor() -> alt.Chart:
    """Return the upright line at the chosen step."""
    at = alt.Chart(alt.Data(values=[{}])).mark_rule(style="cursor")
    return at.encode(x=alt.XDatum(alt.expr("step"), type="quantitative"))


def level(*values: float, upright: bool = False) -> alt.Chart:
    """Return dotted lines across the panel: where γ or β began, or where nothing is."""
    rows = alt.Data(values=[{"value": value} for value in values])
    return alt.Chart(rows).mark_rule(style="level").encode(**{"x" if upright else "y": "value:Q"})


def x_step(title: str | None = "training step") -> alt.X:
    """Return the axis of training steps, the same in every chart."""
    return alt.X("step:Q", title=title, axis=alt.Axis(tickMinStep=1), scale=alt.Scale(nice=False, zero=False))


def y_axis(**options: Any) -> alt.Axis:
    """Return the axis of values, with very large and very small ones in powers of ten instead of twenty digits."""
    usual = "abs(datum.value) >= 1e-4 && abs(datum.value) < 1e6"
    label = f"datum.value === 0 ? '0' : {usual} ? datum.label : format(datum.value, '.2~e')"
    return alt.Axis(labelExpr=label, **options)


def broken(trace: alt.Data, role: str) -> alt.Chart:
    """Return a cross at the foot of the panel for every step where the role had a value that was not finite."""
    chart = alt.Chart(trace).transform_filter(f"indexof(datum.broken, '{role}') >= 0")
    return chart.mark_point(style="broken").encode(x=x_step(), y=alt.value("height"), tooltip=["step:Q", "broken:N"])


def _reach(data: alt.Data, center: str, spread: str) -> alt.Chart:
    """Return the data with lo, hi = center -+ spread, null where either is: null counts as 0 in Vega's arithmetic."""
    valid = f"isValid(datum.{center}) && isValid({spread})"
    return alt.Chart(data).transform_calculate(
        lo=f"{valid} ? datum.{center} - {spread} : null", hi=f"{valid} ? datum.{center} + {spread} : null"
    )


# role: center, spread (a Vega expression), title of the y-axis
_STD = "(isValid(datum.batch_var) ? sqrt(datum.batch_var) : null)"
_SCALE = "(isValid(datum.gamma) ? abs(datum.gamma) : null)"
_ROLES = {
    "measured": ("batch_mean", _STD, "value of the channel, coming in"),
    "learned": ("beta", _SCALE, "value of the channel, going out"),
}


def _panel(role: str, trace: alt.Data, probes: alt.Data | None, width: int, height: int) -> alt.LayerChart:
    """Return the ribbon center ± spread over the steps, with the chosen step standing out."""
    center, spread, title = _ROLES[role]
    base = _reach(trace, center, spread).encode(x=x_step())
    y = alt.Y("lo:Q", title=title, axis=y_axis(), scale=alt.Scale(zero=False))
    tooltip = [alt.Tooltip("step:Q"), *(alt.Tooltip(f"{f}:Q", format=".4g") for f in (center, "lo", "hi"))]
    # Batches stand apart: dots on a jagged ribbon. What is learned is carried over from step to step: a line.
    measured = role == "measured"
    ribbon = base.mark_area(style=f"{role}-ribbon", interpolate="step" if measured else "linear").encode(y, y2="hi:Q")
    middle = base.mark_circle(style=f"{role}-dot") if measured else base.mark_line(style=f"{role}-line")
    chosen = [base.transform_filter("datum.step === step && batch === 0")]
    if probes is not None:
        other = _reach(probes, center, spread).transform_filter("datum.step === probe && datum.batch === batch")
        chosen.append(other.encode(x=alt.XDatum(alt.expr("step"), type="quantitative")))
    layers: list[Any] = [ribbon, middle.encode(y=f"{center}:Q", tooltip=tooltip)]
    if not measured:
        layers.append(level(-1, 0, 1))
    if measured:
        layers.append(base.mark_line(style="tracked").encode(y="running_mean:Q"))
    layers += [broken(trace, role), cursor()]
    for now in chosen:
        layers.append(now.mark_rule(style=f"{role}-reach").encode(y="lo:Q", y2="hi:Q"))
        layers.append(now.mark_point(style=f"{role}-now").encode(y=f"{center}:Q"))
    if not measured:
        layers += [*_pushes(base), *_would()]
    return alt.layer(*layers).properties(width=width, height=height)


def _pushes(base: alt.Chart) -> list[alt.Chart]:
    """Return arrows at the chosen step: where -gradient pushes β (at the middle) and |γ| (at the upper end)."""
    sign = "(datum.gamma < 0 ? -1 : 1)"
    ends = {"beta": ("beta:Q", "datum.beta_grad"), "gamma": ("hi:Q", f"datum.gamma_grad * {sign}")}
    arrows = []
    for quantity, (end, slope) in ends.items():
        at = base.transform_filter(f"datum.step === step && batch === 0 && isValid(datum.{quantity}_grad)")
        at = at.transform_calculate(push=f"{slope} < 0 ? '↑' : {slope} > 0 ? '↓' : ''")
        tooltip = [alt.Tooltip("step:Q"), alt.Tooltip(f"{quantity}_grad:Q", format=".4g")]
        arrows.append(at.mark_text(style="push", fontSize=24).encode(y=end, text="push:N", tooltip=tooltip))
    return arrows


def _would() -> list[alt.Chart]:
    """Return the bar of what would go out, dashed beside the chosen step, where there is one to show."""
    base = alt.Chart(alt.Data(values=[{}])).transform_calculate(**{end[6:]: end for end in WOULD})
    base = base.transform_filter("isValid(datum.mid)").encode(x=alt.XDatum(alt.expr("step"), type="quantitative"))
    return [
        base.mark_rule(style="would-reach", xOffset=-9).encode(y="lo:Q", y2="hi:Q"),
        base.mark_point(style="would-now", xOffset=-9).encode(y="mid:Q"),
    ]


def _strip(role: str, probes: alt.Data, height: int) -> alt.LayerChart:
    """Return the probe batches of the probed step nearest to the chosen one: the same weights, other batches."""
    center, spread, _ = _ROLES[role]
    chosen = "datum.batch === batch"
    base = _reach(probes, center, spread).transform_filter("datum.step === probe")
    base = base.encode(
        x=alt.X("batch:O", title=None, axis=alt.Axis(labelAngle=0, labelOverlap=True)),
        opacity=alt.condition(f"batch === 0 || {chosen}", alt.value(1), alt.value(0.35)),
    )
    y = alt.Y("lo:Q", title=None, axis=alt.Axis(labels=False, minExtent=0))
    tooltip = [alt.Tooltip("batch:O"), *(alt.Tooltip(f"{f}:Q", format=".4g") for f in (center, "lo", "hi"))]
    dot = base.mark_point(style=f"{role}-now").encode(
        y=f"{center}:Q", tooltip=tooltip, size=alt.condition(chosen, alt.value(110), alt.value(45))
    )
    # The probe's step, not the cursor's: whoever moves the slider stays with the nearest step that was probed.
    words = alt.ExprRef("['other batches,', 'weights of step ' + format(probe, ',')]")
    title = alt.TitleParams(words, style="strip", orient="bottom", anchor="middle", offset=6)
    return alt.layer(base.mark_rule(style=f"{role}-reach").encode(y=y, y2="hi:Q"), dot, title=title).properties(
        width=STRIP, height=height
    )


def _with_strip(role: str, trace: alt.Data, probes: alt.Data | None, width: int, height: int) -> Any:
    if probes is None:
        return _panel(role, trace, None, width, height)
    parts = _panel(role, trace, probes, width - STRIP, height), _strip(role, probes, height)
    return alt.hconcat(*parts, spacing=16).resolve_scale(y="shared")


def measured(trace: alt.Data, probes: alt.Data | None = None, *, width: int = 560, height: int = 222) -> Any:
    """Return the measured panel: this batch's mean ± std, dot by dot, and the running mean in dashes."""
    return _with_strip("measured", trace, probes, width, height)


def learned(trace: alt.Data, probes: alt.Data | None = None, *, width: int = 560, height: int = 222) -> Any:
    """Return the learned panel: β ± |γ|, which starts at 0 ± 1 and moves by its gradient."""
    return _with_strip("learned", trace, probes, width, height)


def both(trace: alt.Data, probes: alt.Data | None) -> list[Any]:
    """Return both panels, each under what it says: side by side they are the picture for a PNG or a notebook."""
    left = measured(trace, probes).properties(title=alt.Title(MEASURED[0], subtitle=MEASURED[1]))
    right = learned(trace, probes).properties(title=alt.Title(LEARNED[0], subtitle=LEARNED[1]))
    return [left, right]
