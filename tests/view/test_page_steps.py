"""The page's worked steps, histograms, maps of layers and nested experiments, in a real browser, beside NumPy."""

from __future__ import annotations

import json

import numpy as np
import pytest
from reading import marks, place, settle
from synthetic import bells, layer, probe_values, sgd_steps, story, write_run
from view.conftest import wait_until

import batchnorm as bn
from batchnorm.runs import open_run
from batchnorm.runs.schema import HISTOGRAM_EDGES

pytestmark = pytest.mark.browser

LAYERS = (layer("one", 4), layer("two", 3))
STEPS, BATCHES, PROBED = 40, 3, (10, 30)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    values = [story(info, STEPS, seed) for seed, info in enumerate(LAYERS)]
    values[0]["gamma"][:, 1] *= -1  # a channel whose histogram goes out the other way round
    values[1]["gamma_grad"][25, 2] = np.nan
    return write_run(
        tmp_path_factory.mktemp("steps") / "run",
        LAYERS,
        values,
        probes=probe_values(PROBED, BATCHES, 7),
        updates=sgd_steps(values, (0, 1, 8, 9, 32, 33)),
        histograms=bells(LAYERS, PROBED),
    )


@pytest.fixture
def page(open_page, path):
    return open_page(bn.report(path, path.parent / "page.html"))


def seen(page, chart):
    page.locator(f"#chart-{chart}").scroll_into_view_if_needed()
    wait_until(page, f"batchnorm.views.has('{chart}')")
    settle(page)


def test_a_worked_step_closes(page, path):
    run = open_run(path)
    page.evaluate("batchnorm.pick(1, 0)")
    for quantity in ("gamma", "beta"):
        page.locator(f"[name=worked][value={quantity}]").check()
        for update in run.updates("two"):
            page.locator("#worked-step").select_option(str(update.step))
            channel = place(page)[1]
            change = getattr(update, quantity)
            rows = page.locator("#worked-terms tr").all()
            said = {row.locator("th").inner_text(): row.locator("td").last.inner_text() for row in rows}
            number = {name: float(value.replace("−", "-")) for name, value in said.items() if value != "not finite"}
            # Values are shown to 7 digits.
            assert number[f"{quantity} before"] == pytest.approx(change.before[channel], rel=1e-6, abs=1e-30)
            if np.isfinite(change.gradient[channel]):
                # lr * gradient, by SGD without momentum, is what the synthetic run was made with.
                after = np.float64(change.before[channel]) - change.options["lr"] * np.float64(change.gradient[channel])
                assert number[f"{quantity} after"] == pytest.approx(after, rel=1e-6)
            told = page.locator("#worked-said").inner_text()
            assert f"after step {update.step} meets" in told


def test_the_worked_step_is_the_one_nearest_to_the_readers(page):
    for at, step in ((0, 0), (12, 9), (39, 33)):
        page.locator("#step").evaluate("(e, v) => { e.value = v; e.dispatchEvent(new Event('input')) }", at)
        assert page.locator("#worked-step").input_value() == str(step)


@pytest.mark.parametrize("channel", [0, 1])
def test_histograms_are_those_of_the_run_moved_and_scaled(page, path, channel):
    run = open_run(path)
    places = page.evaluate("batchnorm.run.layers[0].channels")
    page.evaluate(f"batchnorm.pick(0, {places.index(channel)})")
    page.locator("#step").evaluate("(e) => { e.value = 29; e.dispatchEvent(new Event('input')) }")
    seen(page, "spread_in")
    seen(page, "spread_out")
    steps, channels, shares = run.histograms("one")
    p = steps.tolist().index(30)
    assert page.locator("#spread-said").inner_text().endswith("weights of step 30.")
    mean, var = (run.probes("one", q)[1][p, :, channel].astype(np.float64) for q in ("batch_mean", "batch_var"))
    at = run.vectors("one", "gamma")[0].tolist().index(30)
    gamma, beta = (float(run.vectors("one", q)[1][at, channel]) for q in ("gamma", "beta"))
    for chart, middles, scales in (
        ("spread_in", mean, np.sqrt(var + LAYERS[0].eps)),
        ("spread_out", np.full(BATCHES, beta), np.full(BATCHES, gamma)),
    ):
        drawn = [m["datum"] for m in marks(page, chart, "area") if m["datum"]]
        for b in range(BATCHES):
            mine = sorted((each for each in drawn if each["batch"] == b + 1), key=lambda each: each["value"])
            edges = np.sort(middles[b] + scales[b] * HISTOGRAM_EDGES[::2].astype(np.float64))
            assert [each["value"] for each in mine] == pytest.approx(edges.tolist(), rel=1e-6, abs=1e-9)
            heights = np.array([each["top"] - each["floor"] for each in mine])[:-1]
            share = shares[p, b, list(channels).index(channel)].astype(np.float64).reshape(-1, 2).sum(1)
            share = share if scales[b] > 0 else share[::-1]
            # One common height for all batches; a byte keeps the square root of a share to 1 / 508.
            np.testing.assert_allclose(heights / heights.max(), share / share.max(), atol=0.02)


def test_another_batch_stands_out_in_the_histograms(page):
    seen(page, "spread_in")
    page.evaluate("document.querySelector('#another').click()")  # the chart stays in view
    settle(page)
    opacity = {m["datum"]["batch"]: m["opacity"] for m in marks(page, "spread_in", "area") if m["datum"]}
    assert opacity[1] > opacity[2]


def test_maps_of_layers_lead_to_the_first_screen_and_cross_what_is_not_finite(page, path):
    seen(page, "heat_spread")
    page.locator("#heat-map").select_option("gradient")
    seen(page, "heat_gradient")
    assert not page.locator("#chart-heat_spread").is_visible()
    crossed = [m["datum"] for m in marks(page, "heat_gradient", "symbol") if "layer" in (m["datum"] or {})]
    assert [(each["layer"], each["step"]) for each in crossed] == [("two", 25)]
    cells = [m["datum"] for m in marks(page, "heat_gradient", "rect") if m["datum"] and "until" in m["datum"]]
    run = open_run(path)
    pushes = np.concatenate([run.vectors("one", q)[1][7] for q in ("gamma_grad", "beta_grad")]).astype(np.float64)
    (cell,) = [each for each in cells if (each["layer"], each["step"]) == ("one", 7)]
    assert cell["value"] == pytest.approx(np.sqrt(np.mean(pushes**2)), rel=1e-6)
    page.locator("#chart-heat_gradient .mark-rect path").nth(STEPS + 11).click()
    assert place(page)[0] == "two"
    assert place(page)[2] == 11


def test_a_run_without_them_has_none_of_these_sections(open_page, run_path, tmp_path):
    page = open_page(bn.report(run_path, tmp_path / "page.html"))
    assert page.locator("#worked-step").count() == 0
    assert page.locator("#chart-spread_in").count() == 0


def test_an_experiment_within_the_folder_is_named_and_linked(open_page, experiment_path, tmp_path):
    import shutil

    whole = shutil.copytree(experiment_path, tmp_path / "run")
    inner = shutil.copytree(experiment_path, whole / "gamma-beta")
    facts = json.loads((inner / "run.json").read_text())
    facts["meta"] |= {"experiment": "gamma-beta", "learns": "gamma and beta"}
    (inner / "run.json").write_text(json.dumps(facts))
    page = open_page(bn.report(whole))
    assert page.get_by_role("heading", name="When γ and β are all that learns").count() == 1
    assert page.get_by_role("link", name="Its page: gamma-beta").get_attribute("href") == "gamma-beta/report.html"
