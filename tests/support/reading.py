"""What the page tells: read in the browser, and from the run by the reader."""

from __future__ import annotations

import numpy as np
import pytest

import batchnorm as bn

MEASURED, TRACKED, LEARNED = ("batch_mean", "batch_std"), ("running_mean", "running_std"), ("gamma", "beta")


def numbers(page):
    """What the table says now, by the full value behind every rounded number."""
    read = "all => Object.fromEntries(all.map(e => [e.id, e.value === '' ? null : Number(e.value)]))"
    return {name: np.nan if value is None else value for name, value in page.eval_on_selector_all("data", read).items()}


def place(page):
    """The layer's name, the channel and the step that the page is at."""
    state = page.evaluate("(({layer, place, at, batch}) => ({layer, place, at, batch}))(batchnorm.state)")
    name = page.evaluate("document.querySelector('#layer').selectedOptions[0].text")
    channel = int(page.evaluate("document.querySelector('#channel').selectedOptions[0].text"))
    return name, channel, state["at"], state["batch"]


def expected(run, name, channel, at):
    """The same numbers from the reader."""
    told = {quantity: run.vectors(name, quantity)[1][at, channel].astype(np.float64) for quantity in bn.runs.QUANTITIES}
    return told | {"batch_std": np.sqrt(told["batch_var"]), "running_std": np.sqrt(told["running_var"])}


def check_table(page, run):
    name, channel, at, batch = place(page)
    assert batch == 0
    # The page of a long run shows some of its steps.
    rows = np.searchsorted(run.vectors(name, "gamma")[0], page.evaluate("batchnorm.run.steps"))
    told, said = expected(run, name, channel, rows[at]), numbers(page)
    before = expected(run, name, channel, rows[at - 1]) if at else None
    for quantity in (*MEASURED, *TRACKED, *LEARNED, "gamma_grad", "beta_grad"):
        # Numbers pass through float64 text exactly; the square roots of both sides are correctly rounded.
        assert said[f"now-{quantity}"] == pytest.approx(told[quantity], rel=1e-12)
    for quantity in (*MEASURED, *TRACKED, *LEARNED):
        change = told[quantity] - before[quantity] if before else np.nan
        assert said[f"change-{quantity}"] == pytest.approx(change, rel=1e-9, abs=1e-12, nan_ok=True)


def marks(page, chart, shape):
    """Data behind the marks of one kind that a chart's Vega view has drawn."""
    walk = """([name, shape]) => {
        const found = [];
        const visit = (group) => (group.items || []).forEach((mark) => {
            if (mark.marktype === shape) mark.items.forEach((item) => found.push([item, mark]));
            if (mark.marktype === 'group') mark.items.forEach(visit);
        });
        visit(batchnorm.views.get(name).scenegraph().root.items[0]);
        return found.map(([item, mark]) => ({x: item.x, y: item.y, y2: item.y2, style: mark.role, datum: item.datum,
            opacity: item.opacity, stroke: item.stroke, fill: item.fill, size: item.size}));
    }"""
    return page.evaluate(walk, [chart, shape])


def settle(page):
    page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    page.evaluate("Promise.all([...batchnorm.views.values()].map(view => view.runAsync())).then(() => null)")


def reach(page, chart):
    """The thick bar that shows the chosen batch in a panel: (x, lo, hi) in the data's units, and the drawn x."""
    bars = [m for m in marks(page, chart, "rule") if m["datum"] and "lo" in m["datum"] and "step" in m["datum"]]
    chosen = page.evaluate("batchnorm.state.batch")
    step = page.evaluate(f"batchnorm.views.get('{chart}').signal('step')")
    if chosen:
        bars = [m for m in bars if m["datum"].get("batch") == chosen]
    else:
        bars = [m for m in bars if m["datum"]["step"] == step and "batch" not in m["datum"]]
    return bars
