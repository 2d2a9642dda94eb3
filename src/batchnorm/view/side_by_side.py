"""Several runs on one page: what differs in their settings, how they went, and where gamma and beta ended.

The page is drawn here, as pictures in light and dark colors, and has no script: it works wherever an image does.
"""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .facts import alert_lines, arm_results, damage_lines, extent, facts, health, plain, plural, spoken
from .heat import heat
from .page import VEGA_LITE, environment, policy, require_charts, stylesheet, write_page
from .select import thin

if TYPE_CHECKING:
    from ..runs.reader import Run

PAGE = "side-by-side.html"
MOST_RUNS, MOST_LAYERS, MOST_POINTS, MOST_STEPS, MOST_LOGGED = 6, 30, 300, 60, 2
LETTERS = "ABCDEF"
ROLES = ("measured", "learned", "gradient", "other", "tracked", "muted")  # whose colors the runs have, in order
CLOCKS, OUTCOME = ("step", "epoch"), re.compile("loss|acc", re.IGNORECASE)
LAST = 10  # logged values whose mean is the last
LEARNED, MEASURED = ("gamma", "beta"), ("spread", "drift")


def check(runs: Sequence[Run]) -> None:
    """Raise a ValueError unless so many runs can be told apart."""
    if not 1 <= len(runs) <= MOST_RUNS:
        raise ValueError(f"1 to {MOST_RUNS} runs can be shown side by side, got {len(runs)}")


def report(runs: Sequence[Run], out: str | os.PathLike[str] | None = None) -> Path:
    """Write the page of up to 6 runs and return where it is; if not given, beside the first run."""
    require_charts()
    check(runs)
    return write_page(Path(out) if out is not None else runs[0].path.parent / PAGE, lambda: render(runs))


def render(runs: Sequence[Run]) -> str:
    """Return the page of several runs as HTML."""
    check(runs)
    style = stylesheet()
    notes: list[str] = []
    logged, names = _logged(runs)
    ends = [_ends(run) for run in runs]
    layers = _layers(ends, notes)
    rows = _end_rows(ends, layers)
    said = [facts(run) for run in runs]
    return (
        environment()
        .get_template("side_by_side.html")
        .render(
            policy=policy(style),
            style=style,
            runs=[
                {"letter": letter, "role": role, "run": run, "health": health(run), "extent": extent(run)}
                for letter, role, run in zip(LETTERS, ROLES, runs, strict=False)
            ],
            facts=_differing(runs),
            outcomes=_outcomes(runs, names),
            charts=_charts(logged, names, rows, layers, len(runs)),
            names=names,
            layers=layers,
            ends=ends,
            number=_number,
            alerts=[alert_lines(run) for run in runs],
            damage=[damage_lines(run) for run in runs],
            notes=notes,
            arms=[list(each["arms"]) for each in said],
            plural=plural,
        )
    )


def _differing(runs: Sequence[Run]) -> dict[str, Any]:
    """Return the facts that are not the same in all runs, each with a value a run, and the names of the others."""
    meta = _rows([{name: spoken(value) for name, value in run.meta.items()} for run in runs])
    layers = _rows([{f"layer {info.name}": _layer_said(info) for info in run.main.layers} for run in runs])
    same, like = ([name for name, values in rows.items() if len(set(values)) == 1] for rows in (meta, layers))
    rows = {name: values for name, values in (meta | layers).items() if name not in (*same, *like)}
    return {"rows": rows, "same": [*same, *([plural(len(like), "layer")] if like else [])]}


def _rows(told: Sequence[dict[str, str]]) -> dict[str, list[str]]:
    """Return what each run says of a thing, for all things that any of them speaks of."""
    names = dict.fromkeys(name for each in told for name in each)
    return {name: [each.get(name, "–") for each in told] for name in names}


def _layer_said(info: Any) -> str:
    said = f"{info.kind}, {plural(info.channels, 'channel')}, eps {info.eps:g}, momentum {info.momentum}"
    return said + ("" if info.affine else ", affine=False") + ("" if info.tracks else ", tracks nothing")


def _scalars(run: Run) -> dict[str, list[tuple[int, float]]]:
    """Return what was logged, by name: (step, value)."""
    found: dict[str, list[tuple[int, float]]] = {}
    for row in run.main.scalars():
        for name, value in row.items():
            if name not in CLOCKS and isinstance(value, (int, float)) and not isinstance(value, bool):
                found.setdefault(name, []).append((row["step"], float(value)))
    return found


def _logged(runs: Sequence[Run]) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the rows of the chart of what was logged, and its names: losses and accuracies first."""
    scalars = [_scalars(run) for run in runs]
    names = list(dict.fromkeys(name for found in scalars for name in found))
    names.sort(key=lambda name: (-sum(name in found for found in scalars), not OUTCOME.search(name)))
    rows = [
        {"run": letter, "order": order, "name": name, "step": found[name][i][0], "value": found[name][i][1]}
        for order, (letter, found) in enumerate(zip(LETTERS, scalars, strict=False))
        for name in names[:MOST_LOGGED]
        if name in found
        for i in thin(len(found[name]), MOST_POINTS).tolist()
    ]
    return plain(rows), names


def _outcomes(runs: Sequence[Run], names: Sequence[str]) -> dict[str, list[str]]:
    """Return how each run ended, by what is told: accuracies of arms, and the last of what was logged."""
    results = [arm_results(run) for run in runs]
    rows: dict[str, list[str]] = {}
    for arm in dict.fromkeys(name for result in results for name in result):
        scores = [result.get(arm, {}).get("test_accuracy") for result in results]
        rows[f"test accuracy, arm {arm}"] = ["–" if score is None else f"{score:.1%}" for score in scores]
    scalars = [_scalars(run) for run in runs]
    for name in names:
        last = [[value for _, value in found.get(name, [])][-LAST:] for found in scalars]
        rows[f"{name}, mean of the last {LAST} logged"] = [_number(float(np.mean(v)) if v else None) for v in last]
    return rows


def _ends(run: Run) -> dict[str, dict[str, dict[str, float | None]]]:
    """Return where each layer ended: its learned numbers at the last step, its measured ones over the last quarter."""
    main = run.main
    found = heat(main, MOST_STEPS, len(main.layers) or 1)
    at = {name: i for i, name in enumerate(found.layers)}
    ends: dict[str, dict[str, dict[str, float | None]]] = {}
    for layer in facts(main)["layers"]:
        name = layer["name"]
        ends[name] = {}
        for quantity in LEARNED:
            last = (layer[quantity] or {}).get("last") or dict.fromkeys(("p05", "p50", "p95"))
            ends[name][quantity] = {"value": last["p50"], "lo": last["p05"], "hi": last["p95"]}
        for quantity in MEASURED:
            late = found.values[quantity][at[name], len(found.steps) * 3 // 4 :]
            late = late[np.isfinite(late)]
            value = float(np.median(late)) if len(late) else None
            ends[name][quantity] = {"value": value, "lo": None, "hi": None}
    return ends


def _layers(ends: Sequence[dict[str, Any]], notes: list[str]) -> list[str]:
    """Return the names of the layers to show, in model order: where there are many, those that differ most."""
    names = list(dict.fromkeys(name for of_run in ends for name in of_run))
    if len(names) <= MOST_LAYERS:
        return names

    def differ(name: str) -> float:
        ways = []
        for quantity in LEARNED:
            values = [of_run[name][quantity]["value"] for of_run in ends if name in of_run]
            known = [value for value in values if value is not None]
            ways.append(max(known) - min(known) if known else 0.0)
        return float(np.hypot(*ways))

    chosen = set(sorted(names, key=differ, reverse=True)[:MOST_LAYERS])
    notes.append(f"{MOST_LAYERS} of {len(names):,} layers: those whose gamma and beta differ most between the runs.")
    return [name for name in names if name in chosen]


def _end_rows(ends: Sequence[dict[str, Any]], layers: Sequence[str]) -> list[dict[str, Any]]:
    return [
        {"run": letter, "order": order, "layer": name, "quantity": quantity, **of_run[name][quantity]}
        for order, (letter, of_run) in enumerate(zip(LETTERS, ends, strict=False))
        for name in layers
        if name in of_run
        for quantity in (*LEARNED, *MEASURED)
    ]


def _charts(
    logged: list[dict[str, Any]], names: Sequence[str], rows: list[dict[str, Any]], layers: Sequence[str], runs: int
) -> dict[str, dict[str, str]]:
    """Return the pictures: of each chart its light and its dark one, as data: addresses."""
    import altair as alt

    from .charts import beside

    data = {"logged": logged, "ends": rows}
    made: dict[str, Any] = {}
    if logged:
        made["logged"] = beside.logged(alt.NamedData("logged"), names[:MOST_LOGGED])
    for name, quantities in (("learned", LEARNED), ("measured", MEASURED)):
        if any(row["quantity"] in quantities and row["value"] is not None for row in rows):
            made[name] = beside.ends(alt.NamedData("ends"), layers, runs, quantities)
    return {name: _pictures(chart.to_dict(validate=False) | {"datasets": data}) for name, chart in made.items()}


def _pictures(spec: dict[str, Any]) -> dict[str, str]:
    import vl_convert

    from . import charts

    pictures = {}
    for look, palette in (("light", charts.LIGHT), ("dark", charts.DARK)):
        config = charts.config(palette)
        config["range"] = {**config["range"], "category": [getattr(palette, role) for role in ROLES]}
        spec = {**spec, "config": config, "padding": charts.PADDING}
        svg = vl_convert.vegalite_to_svg(spec, vl_version=VEGA_LITE)
        pictures[look] = "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()
    return pictures


def _number(value: float | None) -> str:
    return "–" if value is None or not np.isfinite(value) else f"{value:.4g}".replace("-", "−")
