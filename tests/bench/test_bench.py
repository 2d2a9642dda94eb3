"""`batchnorm bench`: what it prints, what it times, and that a wrong result is not timed."""

import json
import statistics

import pytest
import torch
from typer.testing import CliRunner

from batchnorm.bench import command as bench
from batchnorm.bench import problem, timing
from batchnorm.bench.problem import Case, Problem
from batchnorm.bench.timing import cases, machine, measure
from batchnorm.cli import app

TINY = cases([(3, 4, 5, 5), (6, 3)], ["BN+ReLU", "BN+add+ReLU"])


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(bench, "SHORT", TINY)
    monkeypatch.setattr(timing, "ROUNDS", (2, 3))


def invoke(*arguments):
    return CliRunner().invoke(app, ["bench", "--seconds", "0.01", *arguments])


def test_json_holds_every_entry_and_the_machine():
    threads = torch.get_num_threads()
    result = invoke("--json", "--threads", "1")
    assert result.exit_code == 0, result.output
    assert torch.get_num_threads() == threads
    found = json.loads(result.stdout)
    assert found["machine"]["torch"] == torch.__version__
    assert found["machine"]["threads"] == 1
    entries = found["entries"]
    assert len(entries) == len(TINY) == 2 * 2 * 3 * (2 + 1)  # dtypes, variants, modes, layouts
    assert {e["shape"] for e in entries} == {"3x4x5x5", "6x3"}
    assert all(e["ours_us"] > 0 and e["torch_us"] > 0 and e["ratio"] > 0 for e in entries)
    mean = found["geometric_means"][0]
    ratios = [e["ratio"] for e in entries if (e["dtype"], e["what"], e["mode"]) == ("float32", "BN+ReLU", mean["mode"])]
    assert len(ratios) == 3
    assert mean["ratio"] == pytest.approx(statistics.geometric_mean(ratios))
    assert mean["slowest"] == min(ratios)


@pytest.mark.parametrize(("columns", "term"), [("20", "dumb"), ("300", "xterm-256color")])
def test_the_table_has_a_row_an_entry_and_the_means(columns, term, monkeypatch):
    # A line is a line, whatever the terminal is and however long the processor's name.
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("TERM", term)
    monkeypatch.setattr(bench, "machine", lambda: {**machine(), "processor": "Intel(R) Xeon(R) Platinum " * 8})
    result = invoke()
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert torch.__version__ in lines[0]
    assert lines[1].split()[:5] == list(bench.COLUMNS)
    assert sum(line.startswith(("3x4x5x5", "6x3")) for line in lines) == len(TINY)
    assert sum(line.startswith(("float32", "bfloat16")) for line in lines) == 2 * 2 * 3
    assert "float64" in result.stdout


@pytest.mark.parametrize("arguments", [("--threads", "0"), ("--seconds", "-1"), ("--rounds", "3")])
def test_wrong_options_are_refused(arguments):
    assert invoke(*arguments).exit_code == 2


@pytest.mark.parametrize("what", ["y", "dx", "dweight", "dbias", "dresidual"])
def test_a_wrong_result_ends_the_command(what, monkeypatch):
    class Wrong(torch.autograd.Function):
        """Off by 0.1 % at one value of what goes through it, forward or backward."""

        @staticmethod
        def forward(ctx, t):
            return _bent(t) if what == "y" else t.clone()

        @staticmethod
        def backward(ctx, gradient):
            return _bent(gradient)

    def wrong(self):
        place = {"y": None, "dx": "x", "dweight": "weight", "dbias": "bias", "dresidual": "residual"}[what]
        if place is None:
            return Wrong.apply(right(self))
        leaf = getattr(self, place)
        if leaf is None:
            return right(self)
        setattr(self, place, Wrong.apply(leaf))
        try:
            return right(self)
        finally:
            setattr(self, place, leaf)

    right = Problem.ours
    monkeypatch.setattr(Problem, "ours", wrong)
    result = invoke()
    assert result.exit_code == 1
    assert result.stdout == ""
    assert f"{what} is off by" in result.stderr


def _bent(t):
    t = t.clone()
    t.view(-1)[t.abs().argmax()] *= 1.001
    return t


def test_the_short_list_has_what_people_use(monkeypatch):
    monkeypatch.undo()
    assert {case.dtype for case in bench.SHORT} == {torch.float32, torch.bfloat16}
    assert {case.last for case in bench.SHORT} == {True, False}
    assert {case.variant for case in bench.SHORT} == set(timing.VARIANTS)
    assert len(set(bench.SHORT)) == len(bench.SHORT)


def test_large_tensors_are_checked_on_some_channels(monkeypatch):
    monkeypatch.setattr(problem, "CHECKED_VALUES", 100)
    measure(Case((4, 40, 5, 5), torch.float32, True, "BN+add+ReLU", "forward+backward"), 0.0)
