"""The page in a real browser, offline: it says and draws the run's numbers, and the reader's moves move them."""

from __future__ import annotations

import json

import numpy as np
import pytest
from reading import LEARNED, MEASURED, TRACKED, check_table, expected, marks, numbers, place, reach, settle
from synthetic import layer, story, write_run
from view.conftest import BATCHES, LAYERS, wait_until

import batchnorm as bn
from batchnorm.runs import open_run

pytestmark = pytest.mark.browser


def test_the_first_screen_needs_no_scrolling(page):
    for selector in ("h1", "#health", "#panels", "#step", "#another", "#line"):
        box = page.locator(selector).bounding_box()
        assert box["y"] >= 0, selector
        assert box["y"] + box["height"] <= 800, selector
        assert box["x"] + box["width"] <= 1280, selector
    measured, learned = (page.locator(f"#chart-{name}").bounding_box() for name in ("measured", "learned"))
    assert measured["x"] + measured["width"] <= learned["x"]


def test_panels_draw_the_runs_own_numbers(page, run):
    name, channel, *_ = place(page)
    whole = {q: run.vectors(name, q)[1][:, channel].astype(np.float64) for q in bn.runs.QUANTITIES}
    dots = [m["datum"] for m in marks(page, "measured", "symbol") if "running_mean" in (m["datum"] or {})]
    by_step = {datum["step"]: datum for datum in dots}
    assert sorted(by_step) == run.steps.tolist()
    for at, step in enumerate(run.steps.tolist()):
        std = np.sqrt(whole["batch_var"][at])
        assert by_step[step]["batch_mean"] == whole["batch_mean"][at]
        assert by_step[step]["lo"] == pytest.approx(whole["batch_mean"][at] - std, rel=1e-12)
        assert by_step[step]["hi"] == pytest.approx(whole["batch_mean"][at] + std, rel=1e-12)
    line = {m["datum"]["step"]: m["datum"] for m in marks(page, "learned", "line") if m["datum"]}
    assert sorted(line) == run.steps.tolist()
    for at, step in enumerate(run.steps.tolist()):
        assert line[step]["hi"] == pytest.approx(whole["beta"][at] + abs(whole["gamma"][at]), rel=1e-12)
    dashes = {m["datum"]["step"]: m["datum"]["running_mean"] for m in marks(page, "measured", "line") if m["datum"]}
    assert [dashes[step] for step in run.steps.tolist()] == whole["running_mean"].tolist()


def test_both_panels_have_one_axis_of_steps(page):
    measured, learned = (
        page.evaluate(f"batchnorm.views.get('{name}').scenegraph().root.items[0].items.length")
        for name in ("measured", "learned")
    )
    assert measured == learned
    boxes = [page.locator(f"#chart-{name} svg").bounding_box() for name in ("measured", "learned")]
    assert boxes[0]["y"] + boxes[0]["height"] == pytest.approx(boxes[1]["y"] + boxes[1]["height"], abs=3)
    for chart in ("measured", "learned"):
        cursor = [m for m in marks(page, chart, "rule") if m["datum"] == {} or not m["datum"]]
        assert cursor


def test_the_slider_moves_both_panels_and_the_table(page, run):
    check_table(page, run)
    seen = []
    for at in (0, 7, 29):
        page.locator("#step").evaluate("(e, v) => { e.value = v; e.dispatchEvent(new Event('input')) }", at)
        settle(page)
        assert place(page)[2] == at
        check_table(page, run)
        step = int(run.steps[at])
        name, channel, *_ = place(page)
        told = expected(run, name, channel, at)
        bars = {}
        for chart, (middle, spread) in {"measured": MEASURED, "learned": ("beta", "gamma")}.items():
            (bar,) = reach(page, chart)
            assert bar["datum"]["step"] == step
            assert bar["datum"]["lo"] == pytest.approx(told[middle] - abs(told[spread]), rel=1e-6, abs=1e-9)
            bars[chart] = bar["x"]
        seen.append((bars["measured"], bars["learned"]))
        assert page.locator("#where").inner_text() == f"{step} of 58"
    assert seen[0][0] < seen[1][0] < seen[2][0]
    assert seen[0][1] < seen[1][1] < seen[2][1]


def test_another_batch_changes_what_is_measured_and_nothing_else(page, run):
    page.locator("#another").click()
    settle(page)
    name, channel, at, batch = place(page)
    assert batch == 1
    assert int(run.steps[at]) in (10, 50)
    probe = [10, 50].index(int(run.steps[at]))
    means, variances = (
        run.probes(name, q)[1][probe, :, channel].astype(np.float64) for q in ("batch_mean", "batch_var")
    )
    learned, blue, still = expected(run, name, channel, at), [], []
    for batch in [*range(1, BATCHES + 1), 1]:
        assert place(page) == (name, channel, at, batch)
        said = numbers(page)
        assert said["now-batch_mean"] == means[batch - 1]
        assert said["now-batch_std"] == pytest.approx(np.sqrt(variances[batch - 1]), rel=1e-12)
        for quantity in (*TRACKED, *LEARNED):
            assert said[f"now-{quantity}"] == pytest.approx(learned[quantity], rel=1e-12)
            assert said[f"change-{quantity}"] == 0
        assert said["change-batch_mean"] != 0
        blue.append(tuple(reach(page, "measured")[0]["datum"][end] for end in ("lo", "hi")))
        still.append(tuple(reach(page, "learned")[0]["datum"][end] for end in ("lo", "hi")))
        assert blue[-1][0] == pytest.approx(means[batch - 1] - np.sqrt(variances[batch - 1]), rel=1e-9)
        page.locator("#another").click()
        settle(page)
    assert len(set(blue)) == BATCHES
    assert len(set(still)) == 1
    assert still[0][1] == pytest.approx(learned["beta"] + abs(learned["gamma"]), rel=1e-9)
    page.locator("#next").click()
    settle(page)
    assert place(page)[2:] == (at + 1, 0)
    check_table(page, run)


def test_the_page_opens_on_a_probed_step_and_the_strips_and_the_button_say_which(page, run):
    name, *_ = place(page)
    probed = run.probes(name, "batch_mean")[0].tolist()
    for at in (place(page)[2], 0, 29):
        page.locator("#step").evaluate("(e, v) => { e.value = v; e.dispatchEvent(new Event('input')) }", at)
        settle(page)
        nearest = min(probed, key=lambda step: abs(step - int(run.steps[at])))
        for chart in ("measured", "learned"):
            words = page.locator(f"#chart-{chart}").text_content()
            assert f"other batches,weights of step {nearest}" in words.replace("\n", "")
        assert page.locator("#another").inner_text() == f"Another batch (step {nearest})"


def test_the_first_step_shown_was_probed(page, run):
    assert int(run.steps[place(page)[2]]) in (10, 50)


def test_next_step_says_how_far_it_goes_and_the_gradient_what_came_of_it(page, run):
    at = place(page)[2]
    assert page.locator("#next").inner_text() == "Next shown step, +2"
    assert f"step {run.steps[at + 1]}" in page.locator("#next").get_attribute("title")
    said = page.locator("#push").inner_text()
    name, channel, *_ = place(page)
    now, then = (expected(run, name, channel, each)["gamma"] for each in (at, at + 1))
    assert f"the gradients of 1 more step move γ by {then - now:+.3f}" in said.replace("−", "-")
    assert said.endswith(f"up to step {run.steps[at + 1]}.")
    page.locator("#next").click()
    assert page.locator("#change-head").inner_text() == f"change since step {run.steps[at]}"


def test_printing_draws_every_chart(page):
    every = page.locator(".chart:visible").count()  # but for the maps that are not chosen
    assert page.locator(".chart svg.marks").count() < every, "those below the first screen wait to be seen"
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    wait_until(page, f"document.querySelectorAll('.chart svg.marks').length === {every}")
    assert page.locator(".chart svg.marks").count() == every
    for box in (each.bounding_box() for each in page.locator(".chart svg.marks").all()):
        assert box["height"] > 50


def test_the_worked_line_is_the_formula(page, run):
    page.locator("#x").fill("2.5")
    name, channel, at, _ = place(page)
    told, said = expected(run, name, channel, at), numbers(page)
    eps = next(info.eps for info in run.layers if info.name == name)
    xhat = (2.5 - told["batch_mean"]) / np.sqrt(told["batch_var"] + eps)
    assert said["line-xhat"] == pytest.approx(xhat, rel=1e-9)
    assert said["line-y"] == pytest.approx(told["gamma"] * xhat + told["beta"], rel=1e-9)
    assert said["line-x"] == 2.5
    page.locator("#x").fill("-40")  # far below the mean: x̂ is negative, and so is β in these runs
    line = " ".join(page.locator("#line").inner_text().split())
    assert "· (−" in line
    assert "+ (−" in line


def test_layer_and_channel_pickers_and_the_address(page, run, open_page, page_path):
    page.locator("#layer").select_option(label="net.bn2")
    page.locator("#channel").select_option(label="1")
    page.locator("#step").evaluate("(e) => { e.value = 4; e.dispatchEvent(new Event('input')) }")
    settle(page)
    assert place(page) == ("net.bn2", 1, 4, 0)
    check_table(page, run)
    assert {m["datum"]["beta"] for m in marks(page, "learned", "line") if m["datum"]} == set(
        run.vectors("net.bn2", "beta")[1][:, 1].tolist()
    )
    again = open_page(page_path, address="#" + page.url.split("#")[1])
    assert place(again) == ("net.bn2", 1, 4, 0)
    check_table(again, run)
    for nonsense in ("#layer=99&channel=x&step=1e99&batch=7", "#%%%&step="):
        assert place(open_page(page_path, address=nonsense))[0] in {info.name for info in LAYERS}


def test_every_chart_is_drawn_once_in_view(page, run):
    for name in ("running_mean", "running_variance", "gamma_grad", "beta_grad", "gamma_bands", "beta_bands"):
        page.locator(f"#chart-{name}").scroll_into_view_if_needed()
        wait_until(page, f"batchnorm.views.has('{name}')")
        assert page.locator(f"#chart-{name} svg.marks path").count() > 1
    name, channel, *_ = place(page)
    drawn = {m["datum"]["step"]: m["datum"]["batch_var"] for m in marks(page, "running_variance", "symbol")}
    assert [drawn[step] for step in run.steps.tolist()] == run.vectors(name, "batch_var")[1][:, channel].tolist()
    drawn = {(m["datum"]["layer"], m["datum"]["step"]): m["datum"] for m in marks(page, "gamma_bands", "line")}
    for info in run.layers:
        stats = run.stats(info.name, "gamma")
        for at, step in enumerate(run.steps.tolist()):
            row = drawn[info.name, step]
            assert [row[p] for p in ("p05", "p25", "p50", "p75", "p95")] == stats[at, 1:6].tolist()


def test_dark_mode_has_its_own_colors_and_follows_a_switch(open_page, page_path):
    from batchnorm.view.charts import DARK, LIGHT

    page = open_page(page_path, color_scheme="dark")
    ground = "getComputedStyle(document.body).backgroundColor"
    strokes = (
        "[...document.querySelectorAll('#chart-measured [stroke]')].map(e => e.getAttribute('stroke').toUpperCase())"
    )
    rgb = tuple(int(DARK.background[i : i + 2], 16) for i in (1, 3, 5))
    assert page.evaluate(ground) == f"rgb{rgb}"
    assert DARK.measured in page.evaluate(strokes)
    assert LIGHT.measured not in page.evaluate(strokes)
    page.emulate_media(color_scheme="light")
    wait_until(page, f"({strokes}).includes('{LIGHT.measured}')")
    assert DARK.measured not in page.evaluate(strokes)


@pytest.mark.parametrize("width", [360, 700, 1920])
def test_any_window_holds_the_page(open_page, page_path, width):
    page = open_page(page_path, viewport={"width": width, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    measured, learned = (page.locator(f"#chart-{name}").bounding_box() for name in ("measured", "learned"))
    stacked = learned["y"] >= measured["y"] + measured["height"]
    assert stacked == (width < 900)
    for name in ("measured", "learned"):
        assert page.locator(f"#chart-{name} svg").bounding_box()["width"] <= width


def test_resizing_draws_anew(page):
    before = page.locator("#chart-measured svg").bounding_box()["width"]
    page.set_viewport_size({"width": 1000, "height": 800})
    wait_until(page, f"document.querySelector('#chart-measured svg').getBoundingClientRect().width < {before - 50}")
    assert page.locator("#chart-measured svg").count() == 1


def test_arms_are_compared(open_page, experiment_path, tmp_path):
    results = json.loads((experiment_path / "results.json").read_text())["arms"]
    page = open_page(bn.report(experiment_path, tmp_path / "page.html"))
    for name in ("arms_curves", "arms_final"):
        page.locator(f"#chart-{name}").scroll_into_view_if_needed()
        wait_until(page, f"batchnorm.views.has('{name}')")
    curves = [m["datum"] for m in marks(page, "arms_curves", "line")]
    for arm, result in results.items():
        drawn = {datum["step"]: datum["test_accuracy"] for datum in curves if datum["arm"] == arm}
        assert drawn == dict(zip(result["curve"]["step"], result["curve"]["test_accuracy"], strict=True))
    dots = {m["datum"]["arm"]: m["datum"]["test_accuracy"] for m in marks(page, "arms_final", "symbol")}
    assert dots == {arm: result["test_accuracy"] for arm, result in results.items()}
    ticks = [m["datum"]["test_accuracy"] for m in marks(page, "arms_final", "rect") if m["datum"]["arm"] == "per-batch"]
    assert sorted(ticks) == sorted(results["per-batch"]["single_pair_accuracy"]["all"])
    for quantity in ("gamma", "beta"):
        page.locator(f"#chart-owned_{quantity}").scroll_into_view_if_needed()
        wait_until(page, f"batchnorm.views.has('owned_{quantity}')")
        name, channel, *_ = place(page)
        drawn = [m["datum"][f"own_{quantity}"] for m in marks(page, f"owned_{quantity}", "symbol")]
        owned = open_run(experiment_path / "per-batch").vectors(name, quantity)[1][:, channel]
        assert drawn == owned.tolist()
    assert "97.0 %" in page.locator("#words").inner_text()


def test_one_arm_alone_is_compared_with_nothing(open_page, tmp_path):
    curve = {"step": [1, 3], "test_accuracy": [0.5, 0.9]}
    results = {"arms": {"learned": {"test_accuracy": 0.9, "train_accuracy": 1.0, "steps": 4, "curve": curve}}}
    path = write_run(tmp_path / "run", arms=["learned"], results=results, meta={"test_samples": 100})
    write_run(path / "learned", [layer("bn", 2)], [story(layer("bn", 2), 1)])
    said = " ".join(open_page(bn.report(path)).locator("main").inner_text().split())
    assert "The arms compared" not in said
    for absent in ("fixed:", "none:", "per-batch", "same batches"):
        assert absent not in said
    assert "1 recorded step; 1 batch-norm layer," in said
