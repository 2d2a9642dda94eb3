"""The terminal's text at any width: wrapped between words, nothing cut, nothing lost."""

from __future__ import annotations

import re
from itertools import pairwise

import numpy as np
import pytest
from rich.cells import cell_len
from rich.console import Console
from synthetic import layer, story, write_run
from typer.testing import CliRunner

from batchnorm.cli import app
from batchnorm.view.terminal import Column, console, rows, say

WIDTHS = [1, 20, 40, 60, 80, 120]
PATH = "/a/path-that/is-longer/than-any-narrow-line/and-must-not/be-cut/report.html"
SENTENCE = f"Of 360 samples 96.7 % came out right, see {PATH}: γ and β, (98.3 %), \u5f52\u4e00\u5316 and the rest."


def printed(capsys, width, *arguments, **options):
    say(Console(width=width), *arguments, **options)
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("width", WIDTHS)
def test_lines_break_between_words_alone(width, capsys):
    lines = printed(capsys, width, SENTENCE)
    assert " ".join(lines) == SENTENCE
    words = re.findall(r"\S+(?: %\S*)?", SENTENCE)
    assert all(cell_len(line) <= width or line in words for line in lines)
    assert not any(line.startswith("%") for line in lines)
    # As full as can be: the first word of a line had no room on the one before.
    for line, after in pairwise(lines):
        first = next(word for word in words if after.startswith(word))
        assert cell_len(f"{line} {first}") > width


def test_lines_that_go_on_are_indented(capsys):
    assert printed(capsys, 10, "one two three four", "- ", "  ") == ["- one two", "  three", "  four"]
    assert printed(capsys, 10, "one two three", "    # ") == ["    # one", "      two", "      three"]
    assert printed(capsys, 10, "") == [""]


@pytest.mark.parametrize("width", WIDTHS)
def test_a_table_that_does_not_fit_is_cards(width, capsys):
    cells = [("name", "12 and more words", ""), (PATH, "3", "a value")]
    rows(Console(width=width), [Column("first"), Column("second", right=True), Column("third")], cells)
    lines = capsys.readouterr().out.splitlines()
    together = " ".join(line.strip() for line in lines)
    if width == 120:
        assert lines[0].split() == ["first", "second", "third"]
        assert len(lines) == 3
    else:
        assert together == f"name second: 12 and more words {PATH} second: 3 third: a value"
        assert all(cell_len(line) <= width or " " not in line.strip() for line in lines)


def test_a_pipe_gets_whole_lines_unless_columns_are_asked_for(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    assert console().width > 10_000
    monkeypatch.setenv("COLUMNS", "40")
    assert console().width == 40


@pytest.fixture(scope="module")
def wide_run(tmp_path_factory):
    """Layers of long names, one of them ill, and long meta."""
    infos = [layer(f"backbone.stage{i}.block{i}.convolution.batch_norm", 4) for i in range(3)]
    values = [story(info, 12) for info in infos]
    values[1]["gamma"][5:] = np.nan
    meta = {"note": "a note of many words that goes on and on", "classes": list(range(20))}
    return write_run(tmp_path_factory.mktemp("wide") / "run", infos, values, meta=meta)


@pytest.mark.parametrize("command", ["show", "list", "diagnose"])
@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_a_command_says_the_same_at_every_width(command, width, wide_run, monkeypatch):
    path = str(wide_run.parent if command == "list" else wide_run)
    monkeypatch.delenv("COLUMNS", raising=False)
    whole = CliRunner().invoke(app, [command, path]).stdout
    monkeypatch.setenv("COLUMNS", str(width))
    narrow = CliRunner().invoke(app, [command, path]).stdout
    # Every word is there, and none is in two pieces. Cards name their columns again, and comments go on with a #.
    # A card begins with what is in the first column, and has no line for an empty cell.
    headings = {"run", "layer", "test", "accuracy"}
    assert set(whole.split()) - headings <= {word.removesuffix(":") for word in narrow.split()} | set(narrow.split())
    for line in narrow.splitlines():
        is_code = line.startswith("  → ")
        assert cell_len(line.rstrip()) <= width or is_code or " " not in line.strip(), line
