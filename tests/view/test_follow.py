"""`batchnorm tail`: lines of a run that another process writes, until it ends."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console
from synthetic import layer, story, write_run

from batchnorm.runs import open_run
from batchnorm.view import follow as follow_module
from batchnorm.view.follow import follow

pytestmark = pytest.mark.processes

GROWING = Path(__file__).with_name("growing.py")


def tail(*arguments):
    command = [sys.executable, "-m", "batchnorm", "tail", *map(str, arguments)]
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8", "env": environment}
    return subprocess.Popen(command, **pipes)


def test_it_waits_follows_and_ends_with_the_run(tmp_path):
    path = tmp_path / "run"
    with tail(path) as follower:
        assert "waiting" in follower.stderr.readline()
        subprocess.run([sys.executable, GROWING, path, "0", "40", "20"], check=True)
        lines = follower.stdout.read().splitlines()
        assert follower.wait() == 0
        assert follower.stderr.read() == ""
    assert "step 20: gamma of first NaN or infinite in 1 channels" in lines
    assert any(line.startswith("serious: nonfinite in first") or "nonfinite" in line for line in lines)
    assert "The training has finished: recorded up to step 39." in lines
    # Medians over the channels, of the last record: 1.039 each, of a variance its root.
    root = f"{1.039**0.5:.4g}"
    assert lines[-2] == (
        f"first: measured mean 1.039, measured std {root}, tracked mean 1.039, tracked std {root}, "
        "learned γ 1.039, learned β 1.039"
    )
    assert lines[-1].startswith("<b>second</b>: ")


def test_a_killed_run_ends_it_unless_it_is_to_stay(tmp_path):
    path = tmp_path / "run"
    training = subprocess.Popen([sys.executable, GROWING, path, "0", "100000"])
    while not (path / "run.json").exists():
        time.sleep(0.05)
    with tail(path) as ends, tail(path, "--follow") as stays:
        ends.stdout.readline()
        training.kill()
        training.wait()
        assert ends.wait(60) == 0
        assert "was interrupted" in ends.stdout.read()
        for line in stays.stdout:
            if "was interrupted" in line:
                break
        assert stays.poll() is None
        stays.send_signal(signal.SIGINT)
        assert stays.wait(60) == 130
        assert stays.stderr.read() == ""


def test_in_a_terminal_it_is_a_table(tmp_path):
    info = layer("<b>net[red].bn</b>", 4)
    path = write_run(tmp_path / "run", [info], [story(info, 5)])
    console = Console(file=io.StringIO(), force_terminal=True, width=120, height=30, legacy_windows=False)
    follow(path, lambda run: [("warning: momentum", (info.name,), "0.99 of [bold]it[/bold]")], console=console)
    said = console.file.getvalue()
    assert "<b>net[red].bn</b>" in said  # as text, not as markup
    assert "momentum in <b>net[red].bn</b>: 0.99 of [bold]it[/bold]" in said
    assert f"{open_run(path).stats(info.name, 'gamma')[-1, 3]:.4g}" in said
    assert "The training has finished: recorded up to step 4." in said


def test_faults_that_pass_are_not_told(tmp_path, monkeypatch):
    """Found once only while the run goes on: not told. Found twice in a row, or at the end: told, once."""
    monkeypatch.setattr(follow_module, "FIND_SECONDS", 0)
    path = tmp_path / "run"
    info = layer("bn", 4)
    write_run(path, [info], [story(info, 5)], status="running")
    (path / ".lock").unlink(missing_ok=True)  # nobody knows of a lock: it stays running
    searches = iter([["passing", "lasting"], ["lasting"], ["lasting"], ["lasting", "late"]])
    console = Console(file=io.StringIO(), width=200)
    looks = []

    def sleep(seconds):
        looks.append(seconds)
        facts = (path / "run.json").read_text()
        if len(looks) == 3:
            facts = facts.replace('"running"', '"finished"')
        (path / "run.json").write_text(facts + " ")

    follow(path, lambda run: [(each, ("bn",), "evidence") for each in next(searches)], console=console, sleep=sleep)
    lines = console.file.getvalue().splitlines()
    assert [line.split(" in ")[0] for line in lines if line.endswith("evidence")] == ["lasting", "late"]
