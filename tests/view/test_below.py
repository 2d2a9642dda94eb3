"""The sections below the first screen: what was logged, the strip of channels, what shares a mean, images."""

from __future__ import annotations

import base64
import json
import math
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from reading import marks, place, settle
from synthetic import layer, probe_values, story, write_run
from view.conftest import wait_until
from view.test_report import EVIL, Page

import batchnorm as bn
from batchnorm.runs import open_run
from batchnorm.view.cubes import CHANNELS, POSITIONS, SAMPLES, cubes
from batchnorm.view.facts import BELOW, NEAR_ZERO
from batchnorm.view.logged import MOST_POINTS, logged
from batchnorm.view.select import select
from batchnorm.view.strip import strips

STEPS, WIDE = 40, 30


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A user's run: a wide layer with dead channels, one without γ and β; a loss that is once NaN, a hostile name."""
    infos = [layer("wide", WIDE), layer("plain", 3, affine=False)]
    values = [story(info, STEPS, seed) for seed, info in enumerate(infos)]
    draw = np.random.default_rng(5)
    values[0]["gamma"] = draw.uniform(-2, 2, (STEPS, WIDE)).astype(np.float32)
    values[0]["gamma"][20:, 4] = NEAR_ZERO / 2
    values[0]["gamma"][20:, 9] = 0
    values[0]["gamma"][20:, 2] = 0.1
    values[0]["beta"][20:, 2] = -0.1 * BELOW * 1.01
    path = write_run(tmp_path_factory.mktemp("below") / "run", infos, values, probes=probe_values([30], 4, WIDE + 3))
    rows = [{"step": t, "loss": "nan" if t == 13 else 2 / (t + 1), EVIL: t, "said": "hello"} for t in range(STEPS)]
    (path / "scalars.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def page_path(path, tmp_path_factory):
    return bn.report(path, tmp_path_factory.mktemp("page") / "page.html")


def test_what_was_logged_is_kept_whole_where_it_fits(path):
    series, more = logged(open_run(path))
    assert ([each.name for each in series], more) == (["loss", EVIL], 0)
    loss = series[0].rows()
    assert [row["value"] for row in loss] == [None if t == 13 else 2 / (t + 1) for t in range(STEPS)]
    assert [row["step"] for row in loss if row["broken"]] == [13]
    assert series[0].note == "1 value not finite (crosses), first at step 13."


def test_thinning_never_loses_the_step_at_which_a_loss_broke(tmp_path):
    info = layer("bn", 2)
    path = write_run(tmp_path / "run", [info], [story(info, 3)])
    count = 10 * MOST_POINTS
    broken = {count // 3 + 1, *range(count - 50, count)}
    rows = [{"step": t, "loss": "inf" if t in broken else 1.0, "huge": 10**400} for t in range(count)]
    (path / "scalars.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    series, _ = logged(open_run(path))
    assert min(row["step"] for row in series[0].rows() if row["broken"]) == min(broken)
    assert len(series[0].steps) <= MOST_POINTS + 60
    assert "of 2,400 logged values, evenly spaced. 51 values not finite (crosses), first at step 801." in series[0].note
    json.dumps(series[0].rows(), allow_nan=False)


def test_an_experiments_log_is_not_shown_twice(experiment_path):
    (experiment_path / "learned" / "scalars.jsonl").write_text('{"step":0,"loss":1.0}\n')
    assert logged(open_run(experiment_path)) == ([], 0)


def test_the_strip_holds_the_runs_own_numbers_and_counts(path):
    run = open_run(path)
    found = strips(select(run), 30)
    assert {0, 30, STEPS - 1} <= set(found.steps.tolist())
    wide, plain = found.layers
    assert plain is None
    assert wide is not None
    assert wide.channels.tolist() == list(range(WIDE))
    for row, step in enumerate(found.steps):
        gamma, beta = (run.vectors("wide", q)[1][step].astype(float) for q in ("gamma", "beta"))
        assert wide.gamma[row].tolist() == gamma.tolist()
        near_zero = [g for g in gamma if abs(g) < NEAR_ZERO]
        shut = [b for g, b in zip(gamma, beta, strict=True) if abs(g) >= NEAR_ZERO and b < -BELOW * abs(g)]
        assert (wide.near_zero[row], wide.shut[row]) == (len(near_zero), len(shut))
    # The rule's own count at the end of the run is the strip's.
    (dead,) = [finding for finding in bn.diagnose(run) if finding.rule == "dead-channels"]
    assert (dead.numbers["zero"], dead.numbers["shut"]) == (wide.near_zero[-1], wide.shut[-1])


def test_many_channels_are_thinned_and_the_smallest_and_largest_stay(tmp_path):
    infos = [layer(f"bn{i}", 100) for i in range(40)]
    values = story(infos[0], 6)
    values["gamma"] = np.random.default_rng(0).normal(size=(6, 100)).astype(np.float32)
    run = open_run(write_run(tmp_path / "run", infos, [values] * 40))
    selection = select(run)
    found = strips(selection, 5)
    size = np.abs(values["gamma"][5])
    for view, strip in zip(selection.layers, found.layers, strict=True):
        assert strip is not None
        assert len(strip.channels) < 100
        assert {int(size.argmin()), int(size.argmax())} <= set(strip.channels.tolist())
        assert set(view.channels.tolist()) <= set(strip.channels.tolist())


def test_the_drawings_color_what_shares_a_mean():
    """Each cell in sight, by its place in the drawing, against the definition of each normalization."""
    pools = {
        "Batch norm": lambda n, c: c,
        "Layer norm": lambda n, c: n,
        "Group norm, G groups": lambda n, c: (n, c // (CHANNELS // 2)),
        "Instance norm": lambda n, c: (n, c),
    }
    inside = [(0, c) for c in range(CHANNELS) for _ in range(POSITIONS)]  # the front
    inside += [(n, c) for c in range(CHANNELS) for n in range(SAMPLES)]  # the top
    inside += [(n, CHANNELS - 1) for n in range(SAMPLES) for _ in range(POSITIONS)]  # the side
    for cube in cubes():
        pool = pools.pop(cube.name)
        chosen = pool(0, CHANNELS - 1)  # the corner next to the reader
        assert [shared for _, shared in cube.cells] == [pool(n, c) == chosen for n, c in inside]
    assert not pools


def test_images_stand_in_for_charts_without_scripts(page_path):
    html = page_path.read_text(encoding="utf-8")
    (inside,) = re.findall(r"<noscript>(.*?)</noscript>", html, re.S)
    images = [attributes for tag, attributes in Page(inside).tags if tag == "img"]
    assert len(images) == 4
    for image in images:
        kind, _, content = image["src"].partition(";base64,")
        assert kind == "data:image/svg+xml"
        assert ET.fromstring(base64.b64decode(content)).tag.endswith("svg")
        assert len(image["alt"]) > 20
    outside = html.replace(inside, "")
    assert not [tag for tag, _ in Page(outside).tags if tag == "img"]


def test_names_that_no_svg_can_hold_are_drawn_as_far_as_they_can(tmp_path):
    """vl-convert ends the process at a NUL."""
    names = ["\0a", "\x01a", "", "a" * 5000, "a" * 5001, "<b>&amp;"]
    infos = [layer(name, 2) for name in names]
    path = write_run(tmp_path / "run", infos, [story(info, 3) for info in infos])
    html = bn.report(path).read_text(encoding="utf-8")
    images = [
        a["src"] for tag, a in Page(re.findall(r"<noscript>(.*?)</noscript>", html, re.S)[0]).tags if tag == "img"
    ]
    texts = [each.text for each in ET.fromstring(base64.b64decode(images[2].partition(",")[2])).iter() if each.text]
    assert {"\ufffda (1)", "\ufffda (2)", "<b>&amp;"} <= set(texts)


@pytest.mark.browser
def test_without_javascript_the_page_shows_images_words_and_no_dead_controls(browser, page_path):
    context = browser.new_context(offline=True, java_script_enabled=False, viewport={"width": 1280, "height": 800})
    page = context.new_page()
    page.goto(page_path.resolve().as_uri())
    assert "runs no JavaScript" in page.locator("noscript").inner_text()
    for image in page.locator("noscript img").all():
        assert image.bounding_box()["height"] > 50
    for gone in ("#step", "#layer", ".chart"):
        assert not page.locator(gone).first.is_visible()
    assert page.locator(".questions summary").first.is_visible()
    context.close()


@pytest.mark.browser
def test_logged_values_are_drawn_and_their_names_are_text(open_page, page_path, path):
    page = open_page(page_path)
    page.locator("#chart-logged_0").scroll_into_view_if_needed()
    wait_until(page, "batchnorm.views.has('logged_0')")
    line = {m["datum"]["step"]: m["datum"]["value"] for m in marks(page, "logged_0", "line") if m["datum"]}
    said = {row["step"]: row["loss"] for row in open_run(path).scalars()}
    assert {t: v for t, v in line.items() if v is not None} == {t: v for t, v in said.items() if not math.isnan(v)}
    assert [m["datum"]["step"] for m in marks(page, "logged_0", "symbol")] == [13]
    assert EVIL in page.locator("h3").all_text_contents()


@pytest.mark.browser
def test_the_strip_is_sorted_marks_the_dead_and_picks_a_channel(open_page, page_path, path):
    page, run = open_page(page_path), open_run(path)
    page.locator("#layer").select_option(label="wide")
    page.locator("#step").evaluate("(e) => { e.value = 30; e.dispatchEvent(new Event('input')) }")
    page.locator("#chart-strip").scroll_into_view_if_needed()
    wait_until(page, "batchnorm.views.has('strip')")
    settle(page)
    shown = sorted((m["datum"] for m in marks(page, "strip", "symbol")[:WIDE]), key=lambda row: row["rank"])
    gamma = run.vectors("wide", "gamma")[1][30]
    assert [row["channel"] for row in shown] == np.argsort(np.abs(gamma), kind="stable").tolist()
    dead = {row["channel"]: row["dead"] for row in shown if row["dead"]}
    assert {4: "|γ| near 0", 9: "|γ| near 0", 2: "shut by a ReLU"}.items() <= dead.items()
    assert f"2 with |γ| below {NEAR_ZERO}" in page.locator("#strip-said").inner_text()
    other = next(row["channel"] for row in shown if row["place"] > 0)
    at = page.evaluate(
        """(channel) => {
        const marks = [...document.querySelectorAll('#chart-strip svg .mark-symbol path')];
        const {x, y, width, height} = marks.find((e) => e.__data__.datum.channel === channel).getBoundingClientRect();
        return [x + width / 2, y + height / 2];
    }""",
        other,
    )
    page.mouse.click(*at)
    settle(page)
    assert place(page)[:2] == ("wide", other)
    assert [m["datum"]["channel"] for m in marks(page, "strip", "symbol")[:WIDE] if m["datum"]["chosen"]] == [other]
    page.locator("#layer").select_option(label="plain")
    settle(page)
    assert "affine=False" in page.locator("#strip-said").inner_text()
    assert "C = 3, so 3 means, each over N·S = 60 values" in page.locator("#shares-here").inner_text()


@pytest.mark.browser
def test_on_paper_every_question_is_open(open_page, page_path):
    page = open_page(page_path)
    answer = page.locator(".questions p").first
    assert not answer.is_visible()
    page.pdf()
    assert answer.is_visible()
