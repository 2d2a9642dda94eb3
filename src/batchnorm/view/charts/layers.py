"""Charts of a layer's or a channel's whole story: γ and β in bands, running against batch, gradients."""

from __future__ import annotations

from typing import Any

import altair as alt

from .panels import broken, cursor, level, x_step, y_axis

START = {"gamma": 1.0, "beta": 0.0}  # where PyTorch starts them


def bands(data: alt.Data, quantity: str, *, columns: int = 4, width: int = 250, height: int = 90) -> Any:
    """Return one small panel a layer: the middle 90 % and 50 % of its channels, and the median, over the steps.

    `data` has a row a layer and step: step, index (model order), layer, p05, p25, p50, p75, p95.
    """
    base = alt.Chart().encode(x=x_step(None))
    y = alt.Y("p05:Q", title=None, scale=alt.Scale(zero=False), axis=y_axis(tickCount=3))
    once = alt.Chart().transform_aggregate(n="count()", groupby=["layer"])
    tooltip = ["layer:N", "step:Q", *(alt.Tooltip(f"{p}:Q", format=".4g") for p in ("p05", "p50", "p95"))]
    layered = alt.layer(
        base.mark_area(style="learned-ribbon").encode(y=y, y2="p95:Q"),
        base.mark_area(style="learned-band").encode(y="p25:Q", y2="p75:Q"),
        once.mark_rule(style="level").encode(y=alt.YDatum(START[quantity])),
        once.mark_rule(style="cursor").encode(x=alt.XDatum(alt.expr("step"), type="quantitative")),
        base.mark_line(style="learned-line").encode(y="p50:Q", tooltip=tooltip),
        data=data,
    ).properties(width=width, height=height)
    by_model = alt.EncodingSortField("index", op="min")
    return layered.facet(facet=alt.Facet("layer:N", title=None, sort=by_model), columns=columns, spacing=18)


def _running(trace: alt.Data, batch: str, running: str, title: str, width: int, height: int, scale: alt.Scale) -> Any:
    base = alt.Chart(trace).encode(x=x_step())
    y = alt.Y(f"{batch}:Q", title=title, axis=y_axis(), scale=scale)
    tooltip = ["step:Q", alt.Tooltip(f"{batch}:Q", format=".4g"), alt.Tooltip(f"{running}:Q", format=".4g")]
    return alt.layer(
        base.mark_circle(style="measured-dot", size=14).encode(y=y, tooltip=tooltip),
        base.mark_line(style="tracked", strokeWidth=2).encode(y=f"{running}:Q"),
        broken(trace, "measured"),
        cursor(),
    ).properties(width=width, height=height)


def running_mean(trace: alt.Data, *, width: int = 560, height: int = 200) -> Any:
    """Return the batch means as dots and the running mean, which averages them, in dashes."""
    return _running(trace, "batch_mean", "running_mean", "mean", width, height, alt.Scale(zero=False))


def running_variance(trace: alt.Data, *, width: int = 560, height: int = 200) -> Any:
    """Return the batch variances as dots and the running variance, which averages them, in dashes."""
    return _running(trace, "batch_var", "running_var", "variance", width, height, alt.Scale(zero=False))


def gradients(trace: alt.Data, quantity: str, *, width: int = 560, height: int = 150) -> Any:
    """Return the gradient of the loss in γ ("gamma_grad") or β ("beta_grad") of one channel, step by step."""
    base = alt.Chart(trace).encode(x=x_step())
    y = alt.Y(f"{quantity}:Q", title={"gamma_grad": "∂loss/∂γ", "beta_grad": "∂loss/∂β"}[quantity], axis=y_axis())
    return alt.layer(
        level(0),
        base.mark_line(style="gradient-line").encode(
            y=y, tooltip=["step:Q", alt.Tooltip(f"{quantity}:Q", format=".4g")]
        ),
        broken(trace, "gradient"),
        cursor(),
    ).properties(width=width, height=height)


def owned(trace: alt.Data, quantity: str, *, width: int = 560, height: int = 180) -> Any:
    """Return one channel's "gamma" or "beta" in two arms: the one value all batches share, and each batch's own.

    `trace` has own_gamma and own_beta besides: what the batch of that step owns in the arm "per-batch".
    """
    base = alt.Chart(trace).encode(x=x_step())
    own = f"own_{quantity}"
    y = alt.Y(f"{own}:Q", title={"gamma": "γ", "beta": "β"}[quantity], axis=y_axis(), scale=alt.Scale(zero=False))
    tooltip = ["step:Q", *(alt.Tooltip(f"{name}:Q", format=".4g") for name in (quantity, own))]
    return alt.layer(
        level(START[quantity]),
        base.mark_circle(style="own-dot").encode(y=y, tooltip=tooltip),
        base.mark_line(style="learned-line").encode(y=f"{quantity}:Q"),
        cursor(),
    ).properties(width=width, height=height)
