"""A run in Markdown: one screen, and as text whatever is in its names, by a CommonMark parser with GitHub's tables."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest
from markdown_it import MarkdownIt
from synthetic import layer, story, write_run

from batchnorm.runs import open_run
from batchnorm.view.markdown import code, markdown, text

NASTY = [
    "a|b",
    "a\\|b",
    "`tick`",
    "``",
    "a\\",
    "<script>alert(1)</script>",
    "&amp;",
    "*bold* _it_ __init__",
    "[a](http://b)",
    "![a](b)",
    "~~gone~~",
    "$x$",
    "@torvalds",
    "#123",
    "# heading",
    "- item",
    "+ item",
    "1. item",
    "12) item",
    "-",
    ":smile:",
    "www.example.com",
    "https://example.com/?a=b",
    "<!-- x -->",
    "a  b",
    "layer1.0.bn1",
]


class Shown(HTMLParser):
    """What is seen of a piece of HTML: tags, and text in the elements it stands in."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.tags, self.pieces = [], []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        self.pieces.append(data)

    @property
    def text(self):
        return "".join(self.pieces).strip()


def rendered(source):
    return Shown(MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(source))


@pytest.mark.parametrize("name", NASTY)
@pytest.mark.parametrize("write", [text, code])
def test_whatever_is_said_is_text(name, write):
    expected = " ".join(name.split())
    for source in (write(name), f"- {write(name)}"):
        shown = rendered(source)
        assert shown.text == expected
        assert set(shown.tags) <= {"p", "ul", "li", "code", "span"}
    shown = rendered(f"| one | two |\n| :-- | --: |\n| {write(name)} | 2 |\n")
    assert shown.text.replace("\n", "") == f"onetwo{expected}2"
    assert shown.tags.count("td") == 2


@pytest.mark.parametrize("name", ["@torvalds", "#123", ":smile:", "www.example.com", "https://example.com"])
def test_github_finds_nothing_to_link(name):
    # GitHub looks for these in stretches of text, and not in code.
    linked = re.compile(r"@\w|#\d|:\w+:|www\.\w|://\w", re.IGNORECASE)
    assert linked.search(name)
    assert not [piece for piece in rendered(text(name)).pieces if linked.search(piece)]
    assert "code" in rendered(code(name)).tags


def test_control_characters_are_seen():
    assert text("a\x1b[2J\nb\x07") == r"a�\[2J b�"
    assert code("a\x1bb\n") == "`a�b`"


def test_a_run_on_one_screen(run_path):
    run = open_run(run_path)
    said = markdown(run)
    shown = rendered(said)
    for words in ("finished", "30 recorded steps", "no NaN or infinity", "net.bn1", "median over the channels"):
        assert words in shown.text
    gamma = run.stats("net.bn2", "gamma")[-1]
    assert f"1 → {gamma[3]:.3g} [{gamma[1]:.3g}, {gamma[5]:.3g}]" in shown.text
    assert said.startswith("### Batch normalization in `run`\n")
    assert len(said.splitlines()) <= 40


def test_the_worst_and_the_most_moved_layers_come_first_and_the_rest_is_counted(tmp_path):
    infos = [layer(f"bn{i}", 2) for i in range(20)]
    values = [story(infos[0], 6) for _ in infos]
    for i, of_layer in enumerate(values):
        of_layer["gamma"] = of_layer["gamma"] * 0 + 1 + np.linspace(0, i, 6, dtype=np.float32)[:, None]
        of_layer["beta"] = of_layer["beta"] * 0
    values[3]["gamma_grad"][2:4, 0] = np.nan
    values[4]["beta_grad"][5, 1] = np.inf
    said = markdown(open_run(write_run(tmp_path / "run", infos, values)))
    rows = re.findall(r"^\| `(bn\d+)` .* (\S+) \|$", said, re.MULTILINE)
    assert rows == [("bn3", "2"), ("bn4", "1"), *((f"bn{i}", "–") for i in range(19, 9, -1))]
    assert "and 8 more layers: bn9, bn8 and 6 more" in said
    assert "bn3: gamma\\_grad not finite in 2 recorded steps" in said


def test_arms_findings_and_odd_runs(experiment_path, tmp_path):
    run = open_run(experiment_path)
    finding = ("serious", "a rule", "bn, since step 3", "x is 0 < 1", "with x['```']:\n    pass  # </code>")
    said = markdown(run, [finding] * 9)
    shown = rendered(said).text
    assert "per-batch\n90.0%" in shown
    assert "serious: a rule, bn, since step 3: x is 0 < 1" in shown
    assert "with x['```']:\n    pass  # </code>\n" in shown
    assert "and 5 more findings" in shown
    assert "No batch-norm layer was recorded" in markdown(open_run(write_run(tmp_path / "empty")))
