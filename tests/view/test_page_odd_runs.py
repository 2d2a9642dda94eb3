"""Runs that are not as they should be: hostile names, one step, nothing learned, values not finite, nothing at all."""

from __future__ import annotations

import re

import numpy as np
import pytest
from reading import LEARNED, MEASURED, TRACKED, check_table, marks, numbers, place, reach, settle
from synthetic import layer, probe_values, story, write_run
from view.conftest import wait_until

import batchnorm as bn
from batchnorm.runs import open_run

pytestmark = pytest.mark.browser

EVIL = "<img src=x onerror=alert(1)></script><script>alert(2)</script>"
NAMES = (EVIL, "'\"`${alert(3)}\\", "datum.layer['x']", "", "λ‮ \u0000x")


def test_hostile_names_stay_text(open_page, tmp_path):
    infos = [layer(name, 2) for name in NAMES]
    values = [story(info, 5, i) for i, info in enumerate(infos)]
    values[0]["beta_grad"][1] = np.nan  # for its name to be among what was not finite
    path = write_run(tmp_path / "run", infos, values, meta={EVIL: EVIL, "__proto__": {"x": EVIL}})
    page = open_page(bn.report(path))
    options = page.evaluate("[...document.querySelectorAll('#layer option')].map(o => o.text)")
    assert options[0] == EVIL
    page.locator("#chart-gamma_bands").scroll_into_view_if_needed()
    wait_until(page, "batchnorm.views.has('gamma_bands')")
    assert {m["datum"]["layer"] for m in marks(page, "gamma_bands", "line")} == set(NAMES)
    for i in range(len(NAMES)):
        page.locator("#layer").select_option(index=i)
        settle(page)
    page.mouse.move(400, 350)  # a tooltip must not run a name either
    assert page.locator("img").count() == 0


def test_a_run_of_one_step(open_page, tmp_path):
    info = layer("bn", 3)
    page = open_page(bn.report(write_run(tmp_path / "run", [info], [story(info, 1)])))
    run = open_run(tmp_path / "run")
    check_table(page, run)
    assert page.locator("#next").is_disabled()
    assert page.locator("#another").is_disabled()
    assert "w.probe(batches)" in page.locator("#probeless").inner_text()
    assert len(reach(page, "measured")) == len(reach(page, "learned")) == 1


def test_a_layer_without_gamma_and_beta(open_page, tmp_path):
    infos = [layer("plain", 3, affine=False, tracks=False), layer("bn", 2)]
    values = [story(info, 8, i) for i, info in enumerate(infos)]
    page = open_page(bn.report(write_run(tmp_path / "run", infos, values, probes=probe_values([3], 2, 5))))
    assert place(page)[0] == "bn"
    page.locator("#layer").select_option(label="plain")
    settle(page)
    assert "affine=False" in page.locator("#chart-learned .none").inner_text()
    said = numbers(page)
    for quantity in (*TRACKED, *LEARNED):
        assert np.isnan(said[f"now-{quantity}"])
    assert said["line-y"] == said["line-xhat"]
    page.locator("#another").click()
    page.locator("#layer").select_option(label="bn")
    settle(page)
    assert page.locator("#chart-learned .none").count() == 0


def test_values_that_are_not_finite_leave_gaps_crosses_and_words(open_page, tmp_path):
    info = layer("bn", 2)
    values = story(info, 12)
    values["batch_mean"][4:6] = np.nan
    values["batch_var"][4:6] = np.inf
    values["gamma"][9:] = -np.inf
    page = open_page(bn.report(write_run(tmp_path / "run", [info], [values])))
    crosses = [m["datum"]["step"] for m in marks(page, "measured", "symbol") if m["datum"].get("broken")]
    assert {4, 5} <= set(crosses)
    page.locator("#step").evaluate("(e) => { e.value = 4; e.dispatchEvent(new Event('input')) }")
    assert [page.locator(f"#now-{name}").inner_text() for name in MEASURED] == ["NaN", "∞"]
    page.locator("#step").evaluate("(e) => { e.value = 10; e.dispatchEvent(new Event('input')) }")
    assert page.locator("#now-gamma").inner_text() == "−∞"
    assert "0 fine, 1 to look at" in page.locator("#health").inner_text()
    assert "batch_mean not finite in 2 recorded steps, first at step 4" in page.locator("#alerts").inner_text()


@pytest.mark.parametrize("size", [1e20, 1e-20])
def test_axes_of_extreme_values_count_in_powers_of_ten(open_page, tmp_path, size):
    info = layer("bn", 2)
    values = {name: value * np.float32(size) for name, value in story(info, 12).items()}
    values["batch_var"] *= np.float32(min(size, 1e15))
    page = open_page(bn.report(write_run(tmp_path / "run", [info], [values])))
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    every = page.locator(".chart:visible").count()
    wait_until(page, f"document.querySelectorAll('.chart svg.marks').length === {every}")
    labels = page.evaluate("[...document.querySelectorAll('.role-axis-label text')].map(e => e.textContent)")
    assert len(labels) > 20
    assert max(map(len, labels)) <= 8
    assert any(re.search(r"\de[+-]\d", each) for each in labels)


@pytest.mark.parametrize("kind", ["no layers", "no steps", "no vectors"])
def test_a_run_with_nothing_to_draw_says_so(open_page, tmp_path, kind):
    infos = [] if kind == "no layers" else [layer("bn", 2)]
    path = write_run(tmp_path / "run", infos, [story(info, 4) for info in infos])
    if kind == "no steps":
        (path / "stats-0001.bin").write_bytes(b"")
    if kind != "no layers":
        (path / "vectors-0001.bin").write_bytes(b"")
    page = open_page(bn.report(path), charts=False)
    said = page.locator("main .card").first.inner_text()
    words = {
        "no layers": ["no batch-norm layer"],
        "no steps": ["Nothing was recorded", "optimizer never stepped"],
        "no vectors": ["No step of this run holds whole vectors"],
    }
    assert all(each in said for each in words[kind])
    if kind == "no vectors":
        page.locator("#chart-gamma_bands").scroll_into_view_if_needed()
        wait_until(page, "batchnorm.views.has('gamma_bands')")
        drawn = [m["datum"]["p50"] for m in marks(page, "gamma_bands", "line")]
        assert drawn == open_run(path).stats("bn", "gamma")[:, 3].tolist()
