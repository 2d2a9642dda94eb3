"""What the figures of the experiment `paper` are drawn from: rows out of its results."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .facts import arm_results, plain

if TYPE_CHECKING:
    from ..runs.reader import Run

ARMS = ("none", "learned")
_PERCENTILES = ("p15", "p50", "p85")


def paper_rows(run: Run) -> list[dict[str, Any]]:
    """A row a test and arm: arm, step, test_accuracy, p15, p50, p85; [] unless both arms followed their input."""
    rows: list[dict[str, Any]] = []
    results = arm_results(run)
    for arm in ARMS:
        curve = results.get(arm, {}).get("curve") or {}
        names = {"step": "step", "test_accuracy": "test_accuracy", **{p: f"input_{p}" for p in _PERCENTILES}}
        columns = [curve.get(name) or [] for name in names.values()]
        found = [{"arm": arm, **dict(zip(names, values, strict=True))} for values in zip(*columns, strict=False)]
        if not found:
            return []
        rows += found
    return plain(rows)


def paper_limits(rows: list[dict[str, Any]]) -> tuple[float, float]:
    """The least and the greatest percentile; an arm that diverged has none at its end."""
    values = [row[name] for row in rows for name in _PERCENTILES if row[name] is not None]
    return (min(values), max(values)) if values else (-1.0, 1.0)


def paper_charts(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The charts, without data, by the names they have on the page."""
    import altair as alt

    from . import charts

    data, limits = alt.NamedData("paper"), paper_limits(rows)
    made = {f"paper_{arm}": charts.paper_input(data, arm, limits) for arm in ARMS}
    return {"paper_accuracy": charts.paper_accuracy(data), **made}
