"""Several runs on one page: their own numbers, as text, without a script or a request."""

import base64
import hashlib
import json
import re

import numpy as np
import pytest
from synthetic import layer, story, write_run
from view.test_report import EVIL, Page, policy_of

import batchnorm as bn
from batchnorm.runs import open_run
from batchnorm.view.heat import heat

LAYERS = (layer("net.bn1", 6), layer("net.bn2", 3))


def logged(path, **values):
    """Log numbers, one a step, into a run."""
    count = len(next(iter(values.values())))
    rows = ({"step": k, **{name: column[k] for name, column in values.items()}} for k in range(count))
    (path / "scalars.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    root = tmp_path_factory.mktemp("beside")
    one = write_run(
        root / "before",
        LAYERS,
        [story(info, 20, k) for k, info in enumerate(LAYERS)],
        meta={"lr": 0.1, "data": "digits"},
    )
    values = [story(info, 30, 10 + k) for k, info in enumerate(LAYERS)]
    values[1]["beta_grad"][7, 0] = np.nan
    other = (LAYERS[0], layer("net.bn2", 3, momentum=0.01))
    two = write_run(root / "after", other, values, meta={"lr": 0.2, "data": "digits", "fix": "bn first"})
    logged(one, epoch=[0] * 20, loss=np.linspace(2, 1, 20).tolist())
    logged(two, epoch=[0] * 30, loss=np.linspace(2, 0.5, 30).tolist())
    return [one, two]


@pytest.fixture(scope="module")
def html(paths, tmp_path_factory):
    out = tmp_path_factory.mktemp("page") / "page.html"
    assert bn.report(paths, out) == out
    return out.read_text(encoding="utf-8")


def table(html, name):
    """The rows of a table as lists of words."""
    (body,) = re.findall(rf'<table id="{name}">(.*?)</table>', html, re.DOTALL)
    rows = re.findall(r"<tr>(.*?)</tr>", body, re.DOTALL)
    return [
        [re.sub(r"<[^>]*>", "", cell).strip() for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)] for row in rows
    ]


def test_what_differs_and_what_does_not(html):
    assert table(html, "facts") == [
        ["fact", "A", "B"],
        ["lr", "0.1", "0.2"],
        ["fix", "–", "bn first"],
        [
            "layer net.bn2",
            "BatchNorm1d, 3 channels, eps 1e-05, momentum 0.1",
            "BatchNorm1d, 3 channels, eps 1e-05, momentum 0.01",
        ],
    ]
    assert "The same in all: data, 1 layer." in html


def test_how_they_went(html):
    expected = [f"{np.mean(np.linspace(2, end, count)[-10:]):.4g}" for end, count in ((1, 20), (0.5, 30))]
    assert table(html, "outcomes")[1:] == [["loss, mean of the last 10 logged", *expected]]
    assert "B: net.bn2: beta_grad not finite in 1 recorded step, first at step 7" in html


def test_the_numbers_are_the_runs_own(html, paths):
    rows = iter(table(html, "numbers")[1:])
    for info in LAYERS:
        for letter, path in zip("AB", paths, strict=True):
            run = open_run(path)
            maps = heat(run)
            at = maps.layers.index(info.name)
            late = [np.median(maps.values[name][at, len(maps.steps) * 3 // 4 :]) for name in ("spread", "drift")]
            ends = [run.stats(info.name, quantity)[-1, 3] for quantity in ("gamma", "beta")]
            expected = [f"{value:.4g}".replace("-", "−") for value in (*ends, *late)]
            assert next(rows) == [info.name, letter, *expected]


@pytest.mark.browser
def test_pictures_are_inside_and_nothing_is_fetched_or_run(html, paths, browser, tmp_path):
    page = Page(html)
    assert page.blocks("script") == []
    policy = policy_of(page)
    assert policy["default-src"] == policy["script-src"] == ["'none'"]
    digest = base64.b64encode(hashlib.sha256(page.blocks("style")[0].encode()).digest()).decode()
    assert policy["style-src"] == [f"'sha256-{digest}'"]
    assert not [name for _, attributes in page.tags for name in attributes if name == "style" or name.startswith("on")]
    path = tmp_path / "page.html"
    path.write_text(html, encoding="utf-8")
    for look in ("light", "dark"):
        context = browser.new_context(offline=True, color_scheme=look, viewport={"width": 390, "height": 800})
        shown = context.new_page()
        problems = []
        shown.on("console", lambda message, problems=problems: problems.append(message.text))
        shown.on("request", lambda request, problems=problems: problems.append(request.url))
        shown.goto(path.as_uri())
        images = shown.evaluate(
            "[...document.images].map(i => [i.complete && i.naturalWidth > 300, i.alt, i.currentSrc])"
        )
        assert len(images) == 3
        assert all(drawn and len(alt) > 20 for drawn, alt, _ in images)
        assert shown.evaluate("document.documentElement.scrollWidth") == 390, "tables and charts scroll by themselves"
        context.close()
        assert [problem for problem in problems if not problem.startswith("data:")] == [path.as_uri()]
        dark = {attributes["srcset"] for tag, attributes in page.tags if tag == "source"}
        assert all((source in dark) == (look == "dark") for _, _, source in images)


def test_the_charts_hold_the_runs_numbers(paths):
    from batchnorm.view import side_by_side

    runs = [open_run(path) for path in paths]
    rows, names = side_by_side._logged(runs)
    assert names == ["loss"]
    np.testing.assert_allclose([row["value"] for row in rows if row["run"] == "B"], np.linspace(2, 0.5, 30))
    ends = side_by_side._end_rows([side_by_side._ends(run) for run in runs], ["net.bn1"])
    gamma = {row["run"]: row for row in ends if row["quantity"] == "gamma"}
    last = runs[1].stats("net.bn1", "gamma")[-1]
    assert [gamma["B"][key] for key in ("lo", "value", "hi")] == [float(last[k]) for k in (1, 3, 5)]


def test_names_are_text(tmp_path):
    paths = []
    for name in ("a", "b"):
        info = layer(EVIL, 2)
        values = story(info, 4)
        values["gamma_grad"][1] = np.nan
        path = write_run(tmp_path / name, [info], [values], meta={EVIL: f"{EVIL}{name}"})
        paths.append(logged(path, **{EVIL: [1.0, 2.0]}))
    out = bn.report(paths)
    assert out == tmp_path / "side-by-side.html"
    page = Page(out.read_text(encoding="utf-8"))
    assert page.blocks("script") == []
    assert {attributes.get("src", "data:")[:5] for tag, attributes in page.tags if tag == "img"} == {"data:"}
    assert page.text.count(EVIL) >= 6


def test_of_many_layers_those_that_differ_most(tmp_path):
    infos = [layer(f"bn{i}", 2) for i in range(40)]
    paths = []
    for k, name in enumerate(("a", "b")):
        values = [dict(story(infos[0], 4)) for _ in infos]
        for i, of_layer in enumerate(values):
            of_layer["gamma"] = of_layer["gamma"] + np.float32(k * i)
        paths.append(write_run(tmp_path / name, infos, values))
    html = bn.report(paths).read_text(encoding="utf-8")
    assert [row[0] for row in table(html, "numbers")[1::2]] == [f"bn{i}" for i in range(10, 40)]
    assert "30 of 40 layers: those whose gamma and beta differ most" in html


def test_odd_runs_and_counts(tmp_path, run_path, experiment_path):
    empty = write_run(tmp_path / "empty")
    html = bn.report([empty, run_path, experiment_path], tmp_path / "p.html").read_text(encoding="utf-8")
    assert "No batch-norm layer was recorded." in html
    assert ["test accuracy, arm per-batch", "–", "–", "90.0%"] in table(html, "outcomes")
    html = bn.report([empty, empty], tmp_path / "q.html").read_text(encoding="utf-8")
    assert "Nothing that the runs say of themselves." in html
    one = bn.report([run_path], tmp_path / "one.html").read_text(encoding="utf-8")
    assert "Gamma and beta are learned." in one, "the usual page"
    for runs in ([], [run_path] * 7):
        with pytest.raises(ValueError, match=f"1 to 6 runs can be shown side by side, got {len(runs)}"):
            bn.report(runs, tmp_path / "no.html")
    assert not (tmp_path / "no.html").exists()
