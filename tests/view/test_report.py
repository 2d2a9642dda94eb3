"""The file that report() writes: whole, strict, small, and with every name as text."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from synthetic import layer, story, write_run

import batchnorm as bn
from batchnorm.runs import open_run

EVIL = "<img src=x onerror=alert(1)></script><script>alert(2)</script>&amp;{{7*7}}"


class Page(HTMLParser):
    """The page as a browser's parser would cut it: scripts, styles, attributes, text."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.open, self.content, self.tags, self.text = [], [], [], ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self.open.append(tag)
            self.content.append((tag, dict(attrs), []))

    def handle_endtag(self, tag):
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_data(self, data):
        if self.open:
            self.content[-1][2].append(data)
        else:
            self.text += data

    def blocks(self, tag, kind=None):
        return ["".join(parts) for t, attrs, parts in self.content if t == tag and attrs.get("type") == kind]


@pytest.fixture(scope="module")
def html(run_path, tmp_path_factory):
    out = tmp_path_factory.mktemp("page") / "page.html"
    assert bn.report(run_path, out) == out
    return out.read_text(encoding="utf-8")


def policy_of(page):
    (content,) = [
        a["content"] for t, a in page.tags if t == "meta" and a.get("http-equiv") == "Content-Security-Policy"
    ]
    return {part.split()[0]: part.split()[1:] for part in content.split("; ")}


def test_policy_allows_the_inline_scripts_by_hash_and_nothing_else(html):
    page = Page(html)
    policy = policy_of(page)
    assert policy["default-src"] == ["'none'"]
    assert "unsafe" not in str(policy)
    for tag, directive in (("script", "script-src"), ("style", "style-src")):
        digests = [hashlib.sha256(text.encode()).digest() for text in page.blocks(tag)]
        assert policy[directive] == [f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests]
    tags = [tag for tag, _ in page.tags]
    assert tags.index("meta") < tags.index("script"), "a policy counts only for what follows it"


def test_nothing_is_fetched(html):
    page = Page(html)
    for tag, attributes in page.tags:
        assert tag not in ("iframe", "object", "embed", "base", "form")
        assert attributes.get("src", "data:image/").startswith("data:image/")
        if tag == "link":
            assert attributes["href"] == "data:,"
        assert not [name for name in attributes if name.startswith("on") or name == "style"]
    assert not re.search(r"url\(|@import", page.blocks("style")[0])


def test_data_is_the_runs_own_numbers(html, run_path):
    run = open_run(run_path)
    (data,) = Page(html).blocks("script", "application/json")
    data = json.loads(data)
    assert data["steps"] == run.steps.tolist()
    for shown in data["layers"]:
        values = np.frombuffer(base64.b64decode(shown["columns"]["beta"]), "<f4").reshape(len(run.steps), -1)
        np.testing.assert_array_equal(values, run.vectors(shown["name"], "beta")[1][:, shown["channels"]])


def test_the_words_of_the_first_screen(html):
    text = " ".join(Page(html).text.split())
    for words in (
        "Each batch is measured. Gamma and beta are learned.",
        "What came in: this batch’s mean ± std.",
        "Measured anew on every batch.",
        "kept for eval; averaged, not learned",
        "What goes out: β ± |γ|.",
        "Learned: each step starts from the last value and moves by its gradient.",
        "2 BN layers: ",
    ):
        assert words in text


def test_names_and_meta_are_text(tmp_path):
    info = layer(EVIL, 2)
    values = story(info, 4)
    values["beta_grad"][1] = np.nan  # for its name to be among what was not finite
    path = write_run(tmp_path / "run", [info], [values], meta={EVIL: [EVIL, 1]})
    page = Page(bn.report(path).read_text(encoding="utf-8"))
    assert len(page.blocks("script")) == 2, "Vega and the page's own"
    assert all(a["src"].startswith("data:image/svg+xml;base64,") for tag, a in page.tags if tag == "img")
    assert json.loads(page.blocks("script", "application/json")[0])["layers"][0]["name"] == EVIL
    assert page.text.count(EVIL) >= 3


def test_default_place_and_atomic_rename(tmp_path, monkeypatch):
    info = layer("bn", 2)
    path = write_run(tmp_path / "run", [info], [story(info, 4)])
    assert bn.report(str(path)) == path / "report.html"
    before = (path / "report.html").read_bytes()
    names = sorted(each.name for each in path.iterdir())

    def refuse(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("os.replace", refuse)
    with pytest.raises(OSError, match="no space"):
        bn.report(path)
    assert (path / "report.html").read_bytes() == before
    assert sorted(each.name for each in path.iterdir()) == names, "nothing half-written is left behind"


def test_the_same_run_gives_the_same_bytes(run_path, tmp_path, html):
    assert bn.report(open_run(run_path), tmp_path / "again.html").read_text(encoding="utf-8") == html


def test_paths_that_are_no_runs(tmp_path):
    with pytest.raises(FileNotFoundError, match="not a run"):
        bn.report(tmp_path)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(ValueError, match="format"):
        bn.report(tmp_path)


@pytest.mark.slow
def test_many_layers_stay_below_three_megabytes_and_say_what_was_left_out(tmp_path):
    layers = [layer(f"layer{i // 12}.{i % 12}.bn", 32) for i in range(53)]
    values = story(layers[0], 130)
    path = write_run(tmp_path / "run", layers, [values] * 53)
    page = bn.report(path)
    assert page.stat().st_size < 3_000_000
    text = Page(page.read_text(encoding="utf-8")).text
    assert "of 130 recorded steps, evenly spaced" in text
    assert "at most 2 a layer" in text


def test_damage_is_told(tmp_path):
    info = layer("bn", 2)
    path = write_run(tmp_path / "run", [info], [story(info, 4)])
    with open(path / "stats-0001.bin", "ab") as file:
        file.write(b"garbage")
    (line,) = open_run(path).damage
    assert line in Page(bn.report(path).read_text(encoding="utf-8")).text
