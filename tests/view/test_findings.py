"""The findings on the page: those of `diagnose`, each leading to its layer, each with a remedy that can be copied."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from reading import place, settle
from synthetic import layer, story, write_run
from view.conftest import wait_until
from view.test_report import EVIL, Page

import batchnorm as bn
from batchnorm.diagnosis.rules.dead import Dead
from batchnorm.reporting import judge
from batchnorm.runs import open_run
from batchnorm.view import facts, page
from batchnorm.view.judgement import Found, Judgement, health

BROKEN_SINCE = 12


@pytest.fixture(scope="module")
def ill_path(tmp_path_factory):
    """Six layers: one with a NaN since step 12, four with dead channels, a fine one between."""
    infos = [layer(name, 8) for name in ("a", "b", EVIL, "c", "d", "e")]
    values = [story(info, 20, seed) for seed, info in enumerate(infos)]
    for name in ("batch_mean", "running_mean"):
        values[0][name][BROKEN_SINCE // 2 :, 3] = np.nan
    for i, dead in zip((1, 2, 4, 5), (1, 2, 3, 4), strict=True):
        values[i]["gamma"][:, :dead] = 5e-4
        values[i]["beta"][:] = 1
    return write_run(tmp_path_factory.mktemp("ill") / "run", infos, values, steps=range(0, 40, 2))


@pytest.fixture(scope="module")
def page_path(ill_path, tmp_path_factory):
    return bn.report(ill_path, tmp_path_factory.mktemp("page") / "page.html")


def test_every_finding_stands_on_the_page_with_its_numbers_and_its_remedy(ill_path, page_path):
    text = " ".join(Page(page_path.read_text(encoding="utf-8")).text.split())
    findings = bn.diagnose(ill_path)
    assert {finding.rule for finding in findings} >= {"nonfinite", "dead-channels"}
    for finding in findings:
        for said in (finding.rule, finding.severity, finding.evidence, finding.remedy):
            assert " ".join(said.split()) in text
        for each in finding.each:
            assert f"{each.layer} {each.evidence}" in text
    assert f"since step {BROKEN_SINCE}" in text
    for line in findings.judged.lines():
        assert line in text


def test_the_health_line_counts_the_layers_to_look_at(ill_path, page_path, run_path):
    ill = {name for finding in bn.diagnose(ill_path) if finding.severity != "note" for name in finding.layers}
    notes = sum(finding.severity == "note" for finding in bn.diagnose(ill_path))
    said = f"6 BN layers: {6 - len(ill)} fine, {len(ill)} to look at"
    assert 0 < len(ill) < 6
    assert said + (f"; {notes} note" if notes else "") in Page(page_path.read_text(encoding="utf-8")).text
    run = open_run(run_path)
    of_all = Found("serious", "mode", "it slept", "model.train()", "the model")
    note = Found("note", "bias", "of no use", "", "net.bn1", ("net.bn1",))
    assert health(run, Judgement([note])) == "2 BN layers: all fine; 1 note"
    assert health(run, Judgement([of_all])) == "2 BN layers: all fine, 1 finding on the whole training"
    assert health(run, None) == health(run, Judgement(nothing=True)) == facts.health(run)


def test_a_run_without_findings_says_so(run_path, tmp_path):
    path = page.report(open_run(run_path), tmp_path / "page.html", Judgement(judged=["Judged: 2 layers."]))
    text = " ".join(Page(path.read_text(encoding="utf-8")).text.split())
    assert "Findings None. Judged: 2 layers." in text


def test_a_run_that_nobody_judged_has_no_such_section(run_path, tmp_path):
    text = Page(page.report(open_run(run_path), tmp_path / "page.html").read_text(encoding="utf-8")).text
    assert "Findings" not in text


@pytest.mark.processes
def test_judging_a_run_does_not_import_torch(ill_path):
    code = (
        "import sys; from batchnorm.reporting import judge; from batchnorm.runs import open_run; "
        f"assert judge(open_run({str(ill_path)!r})).found; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_rule_and_the_page_have_one_threshold(ill_path):
    """The four layers whose channels lie below the page's threshold are those that the rule names."""
    of_layer = next(found for found in bn.diagnose(ill_path) if found.rule == Dead.name)
    assert f"{facts.NEAR_ZERO:g}" in of_layer.evidence
    assert [len(found.layers) for found in judge(open_run(ill_path)).found if found.rule == Dead.name] == [4]


@pytest.mark.browser
def test_a_findings_layer_leads_to_that_layer_and_step(open_page, page_path):
    shown = open_page(page_path)
    shown.locator("#health").click()
    assert shown.evaluate("document.activeElement.id") == "findings"
    assert "layer=" in shown.evaluate("location.hash"), "the address keeps the reader's place"
    shown.locator(".finding.serious .pick").first.focus()
    shown.keyboard.press("Enter")
    settle(shown)
    name, _, at, _ = place(shown)
    assert (name, 2 * at) == ("a", BROKEN_SINCE)
    assert shown.evaluate("document.activeElement.id") == "layer"
    shown.locator(".finding details summary").first.click()
    shown.locator(".finding details .pick", has_text="alert").first.click()
    settle(shown)
    assert place(shown)[0] == EVIL


@pytest.mark.browser
@pytest.mark.parametrize("allowed", [True, False], ids=["clipboard", "no clipboard"])
def test_a_remedy_is_copied_or_else_selected(open_page, page_path, allowed):
    shown = open_page(page_path, **({"permissions": ["clipboard-read", "clipboard-write"]} if allowed else {}))
    if not allowed:
        shown.evaluate("Object.defineProperty(navigator, 'clipboard', {value: undefined})")
    card = shown.locator(".finding").first
    card.locator(".copy").focus()
    shown.keyboard.press("Enter")
    status = card.locator("[role=status]")
    wait_until(shown, "document.querySelector('.copied').textContent")
    remedy = card.locator("code").text_content()
    if allowed:
        assert status.inner_text() == "Copied."
        assert shown.evaluate("navigator.clipboard.readText()") == remedy
    else:
        assert "Selected" in status.inner_text()
        assert shown.evaluate("getSelection().toString()").strip() == remedy.strip()
