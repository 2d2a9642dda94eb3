"""The figures of the experiment `paper`: the run's own numbers, on the page and in a picture; nothing without them."""

from __future__ import annotations

import pytest
from synthetic import layer, story, write_run
from view.conftest import wait_until

from batchnorm.reporting import report
from batchnorm.runs import open_run
from batchnorm.view.page import chart_specs
from batchnorm.view.paper import paper_limits, paper_rows
from batchnorm.view.payload import payload
from batchnorm.view.picture import paper_chart
from batchnorm.view.select import select

STEPS = [10, 20, 30]


def curve(low, high):
    middle = [(a + b) / 2 if a is not None else None for a, b in zip(low, high, strict=True)]
    accuracy = [0.2, 0.6, 0.9]
    inputs = {"input_p15": low, "input_p50": middle, "input_p85": high}
    return {"step": STEPS, "test_accuracy": accuracy, "loss": [1.0, 1.0, 1.0], **inputs}


@pytest.fixture(scope="module")
def paper_path(tmp_path_factory):
    """A run of two arms, of which one diverged at its end."""
    curves = {"learned": curve([-1, -1, -1.5], [1, 1.5, 1.5]), "none": curve([0, -3, None], [0.5, 4, None])}
    results = {arm: {"test_accuracy": 0.9, "steps": 30, "curve": its} for arm, its in curves.items()}
    path = tmp_path_factory.mktemp("paper") / "run"
    write_run(path, arms=list(results), results={"arms": results}, meta={"experiment": "paper", "test_samples": 100})
    for arm in results:
        layers = () if arm == "none" else (layer("bn", 4),)
        write_run(path / arm, layers, [story(info, 30) for info in layers])
    return path


def test_the_rows_are_the_results(paper_path):
    run = open_run(paper_path)
    rows = paper_rows(run)
    for arm in ("learned", "none"):
        expected = run.results["arms"][arm]["curve"]
        of_arm = [row for row in rows if row["arm"] == arm]
        assert [row["step"] for row in of_arm] == STEPS
        assert [row["test_accuracy"] for row in of_arm] == expected["test_accuracy"]
        for name in ("p15", "p50", "p85"):
            assert [row[name] for row in of_arm] == expected[f"input_{name}"]
    assert paper_limits(rows) == (-3, 4)


def test_both_arms_share_an_axis_and_every_chart_is_valid(paper_path):
    chart = paper_chart(open_run(paper_path)).to_dict(validate=True)
    assert chart["datasets"]["paper"] == paper_rows(open_run(paper_path))
    domains = [part["encoding"]["y"]["scale"]["domain"] for figure in chart["hconcat"][1:] for part in figure["layer"]]
    assert domains == [[-3, 4]] * 4


@pytest.mark.browser
def test_the_page_draws_them(paper_path, open_page, tmp_path):
    page = open_page(report(paper_path, tmp_path / "page.html"))
    for name in ("paper_accuracy", "paper_none", "paper_learned"):
        page.locator(f"#chart-{name}").scroll_into_view_if_needed()
        wait_until(page, f"document.querySelector('#chart-{name} svg.marks')")
    assert "without batch norm" in page.locator("#chart-paper_accuracy").text_content()
    assert page.locator("#chart-paper_learned path.mark-area, #chart-paper_learned .mark-area path").count() == 1


def test_no_other_run_has_them(experiment_path):
    run = open_run(experiment_path)
    assert paper_rows(run) == payload(run, select(run))["paper"] == []
    assert not any(name.startswith("paper") for name in chart_specs(run, select(run)))
    with pytest.raises(ValueError, match="no finished run of batchnorm train --experiment paper"):
        paper_chart(run)
