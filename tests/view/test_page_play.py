"""The reader plays: the step player, train and eval, what another gamma or beta would do; in a real browser."""

from __future__ import annotations

import base64

import numpy as np
import pytest
from reading import check_table, expected, marks, numbers, place, settle
from synthetic import layer, story, write_run
from view.conftest import LAYERS, wait_until

import batchnorm as bn
from batchnorm.runs import open_run

pytestmark = pytest.mark.browser


def at(page, where):
    """Go to a step by its place."""
    page.locator("#step").evaluate("(e, v) => { e.value = v; e.dispatchEvent(new Event('input')) }", where)
    settle(page)


def slide(page, name, value):
    page.locator(f"#would-{name}").evaluate("(e, v) => { e.value = v; e.dispatchEvent(new Event('input')) }", value)
    settle(page)


def would(page):
    """The dashed bar in the panel of what goes out: its three numbers, or None."""
    bars = [m["datum"] for m in marks(page, "learned", "rule") if m["datum"] and "mid" in m["datum"]]
    return bars[0] if bars else None


def test_play_goes_through_the_steps_and_pause_and_the_end_stop_it(page):
    at(page, 5)
    page.locator("#speed").select_option("1")
    page.locator("#play").click()
    assert page.locator("#play").inner_text() == "Pause"
    wait_until(page, "batchnorm.state.at >= 7")
    page.locator("#play").click()
    stopped = place(page)[2]
    page.wait_for_timeout(600)
    assert place(page)[2] == stopped < 29
    assert page.locator("#play").inner_text() == "Play"
    page.locator("#speed").select_option("16")
    page.locator("#play").click()
    wait_until(page, "batchnorm.state.at === 29")
    wait_until(page, "document.querySelector('#play').textContent === 'Play'")
    page.locator("#play").click()  # at the end it begins anew
    wait_until(page, "batchnorm.state.at < 29")
    page.locator("#play").click()


def test_keys_step_and_play_but_not_in_a_field(page):
    at(page, 10)
    page.keyboard.press("Escape")
    page.locator("#layer").evaluate("() => document.activeElement.blur()")
    for pressed, then in (("ArrowRight", 11), ("ArrowLeft", 10), ("ArrowLeft", 9), ("Home", 0), ("End", 29)):
        page.keyboard.press(pressed)
        assert place(page)[2] == then, pressed
    at(page, 3)
    page.keyboard.press(" ")
    wait_until(page, "batchnorm.state.at > 3")
    page.keyboard.press(" ")
    stopped = place(page)[2]
    page.locator("#x").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press(" ")
    assert place(page)[2] == stopped
    assert page.locator("#play").inner_text() == "Play"
    page.locator("#play").focus()
    page.keyboard.press(" ")  # once, by the button itself, and not a second time by the page
    assert page.locator("#play").inner_text() == "Pause"


def test_the_slider_tells_its_step(page, run):
    at(page, 7)
    assert page.locator("#step").get_attribute("aria-valuetext") == f"step {run.steps[7]} of {run.steps[-1]}"


def test_eval_takes_the_tracked_numbers_and_measures_nothing(page, run):
    at(page, 12)
    page.locator("#x").fill("0.75")
    page.locator("[name=mode][value=eval]").check()
    settle(page)
    name, channel, *_ = place(page)
    told, said = expected(run, name, channel, 12), numbers(page)
    eps = next(info.eps for info in run.layers if info.name == name)
    std = np.sqrt(told["running_var"] + eps)
    assert said["line-mean"] == told["running_mean"]
    assert said["line-y"] == pytest.approx(told["gamma"] * (0.75 - told["running_mean"]) / std + told["beta"], rel=1e-9)
    assert "nothing is measured" in page.locator("#said").inner_text()
    # y = gamma * (x - running mean) / running std + beta, of a batch with the measured mean and deviation
    middle = told["beta"] + told["gamma"] * (told["batch_mean"] - told["running_mean"]) / std
    spread = abs(told["gamma"]) * told["batch_std"] / std
    assert would(page)["mid"] == pytest.approx(middle, rel=1e-6)
    assert would(page)["hi"] == pytest.approx(middle + spread, rel=1e-6)
    page.locator("[name=mode][value=train]").check()
    settle(page)
    assert would(page) is None
    assert numbers(page)["line-mean"] == told["batch_mean"]
    assert page.locator("#said").inner_text() == ""


def test_eval_is_kept_in_the_address(page, open_page, page_path):
    page.locator("[name=mode][value=eval]").check()
    again = open_page(page_path, address="#" + page.url.split("#")[1])
    assert again.locator("[name=mode][value=eval]").is_checked()


def test_a_layer_that_tracks_nothing_measures_in_eval_too(open_page, tmp_path):
    info = layer("bn", 2, tracks=False)
    path = write_run(tmp_path / "run", [info], [story(info, 5)])
    page, run = open_page(bn.report(path)), open_run(path)
    page.locator("[name=mode][value=eval]").check()
    assert "tracks nothing" in page.locator("#said").inner_text()
    name, channel, where, _ = place(page)
    assert numbers(page)["line-mean"] == expected(run, name, channel, where)["batch_mean"]


def test_sliders_show_what_would_go_out_and_snap_back(page, run):
    at(page, 12)
    page.locator("#x").fill("0.75")
    name, channel, *_ = place(page)
    told = expected(run, name, channel, 12)
    slide(page, "gamma", 0.5)
    slide(page, "beta", 0.25)
    bar = would(page)
    assert (bar["lo"], bar["mid"], bar["hi"]) == (-0.25, 0.25, 0.75)
    said = numbers(page)
    assert said["line-gamma"] == 0.5
    assert said["line-y"] == pytest.approx(0.5 * said["line-xhat"] + 0.25)
    assert said["now-gamma"] == told["gamma"], "the table keeps to what was learned"
    assert "std 0.500" in page.locator("#would-said").inner_text()
    wait_until(page, "Object.keys(batchnorm.state.would).length === 0")
    settle(page)
    assert would(page) is None
    assert numbers(page)["line-gamma"] == told["gamma"]
    assert float(page.locator("#would-gamma").input_value()) == pytest.approx(told["gamma"], rel=1e-6)
    assert "not learning" in page.locator("#would-said").inner_text()


def test_arrows_point_against_the_gradient(page, run):
    for where in range(8):
        at(page, where)
        name, channel, *_ = place(page)
        told = expected(run, name, channel, where)
        arrows = page.evaluate(
            """() => { const found = {}; const visit = (group) => (group.items || []).forEach((mark) => {
                if (mark.marktype === 'text') mark.items.forEach((item) => {
                    if (item.datum && 'push' in item.datum) found[item.y] = item.text; });
                if (mark.marktype === 'group') mark.items.forEach(visit); });
            visit(batchnorm.views.get('learned').scenegraph().root.items[0]); return found; }"""
        )
        upper, middle = (arrows[y] for y in sorted(arrows, key=float))  # the end of the bar is drawn above its middle
        assert middle == ("↑" if told["beta_grad"] < 0 else "↓")
        assert upper == ("↑" if told["gamma_grad"] * np.sign(told["gamma"]) < 0 else "↓")


def test_an_empty_field_asks_for_a_number(page):
    page.locator("#x").fill("")
    assert not page.locator("#formula").is_visible()
    assert page.locator("#said").inner_text() == "Type a number for x."
    page.locator("#x").fill("0.5")
    assert page.locator("#line-x").inner_text() == "0.500"


def test_a_run_with_nan_opens_at_its_first_bad_step(open_page, tmp_path):
    infos = [layer("one", 3), layer("two", 3)]
    values = [story(info, 400, seed) for seed, info in enumerate(infos)]
    values[1]["gamma"][137:, 1] = np.nan
    page = open_page(bn.report(write_run(tmp_path / "run", infos, values)))
    run = open_run(tmp_path / "run")
    name, channel, where, _ = place(page)
    assert (name, channel) == ("two", 1)
    assert page.evaluate("batchnorm.state.at") == where
    assert page.locator("#where").inner_text() == f"137 of {run.steps[-1]}"
    assert page.locator("#now-gamma").inner_text() == "NaN"


def test_a_narrow_window_has_cards_and_keeps_the_step_control_in_view(open_page, page_path, run):
    page = open_page(page_path, viewport={"width": 390, "height": 844})
    table = page.locator(".kinds")
    assert table.evaluate("e => e.scrollWidth") <= 390
    for words in ("this batch alone", "replaced", "not used", "nudged", "carried over"):
        box = table.get_by_text(words, exact=True).first.bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 390
    for where in (0, 600, 1500):
        page.evaluate(f"scrollTo(0, {where})")
        box = page.locator("#step").bounding_box()
        assert 0 <= box["y"] <= 844
    check_table(page, run)


def test_names_of_layers_pick_them_for_others_on_the_page(page):
    page.evaluate("batchnorm.pick(1, 2)")
    assert place(page)[0] == LAYERS[1].name


def test_a_run_that_grew_takes_the_place_of_the_old_and_keeps_the_reader(page, run):
    page.evaluate("batchnorm.pick(1, 2)")
    at(page, 29)
    grown = page.evaluate("JSON.parse(document.querySelector('#run-data').textContent)")
    grown["steps"] = [*grown["steps"], 60]
    for each in grown["layers"]:
        size = len(each["channels"]) * 4
        for name, packed in each["columns"].items():
            # Base64 of whole float32 rows: what is appended is the last row once more.
            raw = base64.b64decode(packed)
            each["columns"][name] = base64.b64encode(raw + raw[-size:]).decode()
    page.evaluate("grown => batchnorm.renew(grown)", grown)
    settle(page)
    assert place(page)[:3] == (LAYERS[1].name, run_channel(page), 30)
    assert page.locator("#where").inner_text() == "60 of 60"
    at(page, 5)
    page.evaluate("grown => batchnorm.renew(grown)", grown)
    assert place(page)[2] == 5


def run_channel(page):
    return int(page.evaluate("document.querySelector('#channel').selectedOptions[0].text"))
