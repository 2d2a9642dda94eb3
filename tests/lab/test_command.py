"""`batchnorm train` as a user meets it: killed, interrupted, asked for JSON, given wrong options."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
from typer.testing import CliRunner

import batchnorm as bn
from batchnorm.cli import app
from batchnorm.lab import Experiment, Settings
from batchnorm.lab.command import _write_page, train
from batchnorm.lab.progress import Progress
from batchnorm.lab.training import CHECKPOINT, Tick
from batchnorm.view.words import summarize

# A run of some seconds that writes a checkpoint after every step.
RUN = """
import sys
from batchnorm.lab import Experiment, Settings
path, data, resume = sys.argv[1], sys.argv[2], sys.argv[3] == "resume"
settings = Settings(data=data, epochs=20, batch_size=8, seed=1)
(Experiment.resume(path) if resume else Experiment.begin(settings, path)).run(checkpoint_seconds=0.0)
"""


@pytest.fixture(scope="module")
def source(blobs):
    """40 samples, 32 of them to train on."""
    return blobs(40)


def wait_for(path: Path, process: subprocess.Popen) -> None:
    """Until the file is there."""
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.002)


def start(*arguments: str) -> subprocess.Popen:
    # Of its own group, so that the signal of the test reaches it alone; and at all, where a shell has started the tests
    # in the background, with SIGINT ignored.
    return subprocess.Popen(
        [sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


@pytest.mark.processes
def test_killed_in_every_kind_of_arm_it_ends_on_the_same_bits(source, tmp_path):
    path = tmp_path / "run"
    for arm in ("learned", "per-batch", "none"):
        process = start("-c", RUN, str(path), source, "resume" if path.exists() else "begin")
        wait_for(path / arm / CHECKPOINT, process)
        time.sleep(0.05)  # into the loop, between any two system calls
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        killed = bn.open_run(path)
        assert killed.status == killed.arms[arm].status == "interrupted"
        assert arm not in killed.results.get("arms", {})
    run = Experiment.resume(path).run()
    whole = Experiment.begin(Settings(data=source, epochs=20, batch_size=8, seed=1), tmp_path / "whole").run()
    for arm, expected in whole.results["arms"].items():
        assert run.results["arms"][arm]["weights_sha256"] == expected["weights_sha256"]
        assert run.results["arms"][arm]["curve"] == expected["curve"]
        assert run.arms[arm].steps.tolist() == whole.arms[arm].steps.tolist()
        assert run.arms[arm].scalars() == whole.arms[arm].scalars()
    assert not list(path.rglob(".checkpoint*"))  # what the kill left half written


@pytest.mark.processes
def test_ctrl_c_leaves_a_readable_run_and_says_how_to_go_on(source, tmp_path):
    path = tmp_path / "a run"
    process = start("-m", "batchnorm", "train", "--data", source, "--epochs", "100000", "--out", str(path))
    wait_for(path / "learned" / "scalars.jsonl", process)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stdout == ""
    assert stderr.splitlines()[-1].endswith(f"To continue: batchnorm train --resume '{path}'")
    assert "Traceback" not in stderr
    run = bn.open_run(path)
    assert run.status == run.main.status == "interrupted"
    assert len(run.main.steps)


@pytest.mark.processes
def test_json_is_all_of_stdout(source, tmp_path):
    pytest.importorskip("altair")
    path = tmp_path / "run"
    command = ["-m", "batchnorm", "train", "--data", source, "--epochs", "2", "--out", str(path), "--json"]
    process = start(*command)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    found = json.loads(stdout)
    assert stdout.count("\n") == 1
    arms, only = bn.open_run(path).results["arms"], bn.open_run(path / "gamma-beta").results["arms"]
    words = [asdict(summarize(bn.open_run(each))) for each in (path, path / "gamma-beta")]
    experiments = {"all": {"arms": arms, "words": words[0]}, "gamma-beta": {"arms": only, "words": words[1]}}
    said = {"run": str(path), "report": str(path / "report.html"), "arms": arms, "experiments": experiments}
    assert found == said
    assert set(found["arms"]) == {"learned", "fixed", "per-batch", "none"}
    assert (path / "report.html").stat().st_size > 1000
    # Not a terminal: plain lines, the last of each arm among them.
    assert "learned (1/4): epoch 2/2, step 2/2, loss " in stderr
    assert "\x1b" not in stderr


def invoke(*arguments: object):
    return CliRunner().invoke(app, ["train", *map(str, arguments)])


def test_the_path_of_the_page_is_the_last_line(source, tmp_path, monkeypatch):
    monkeypatch.setattr("batchnorm.lab.command._write_page", lambda run: run.path / "report.html")
    result = invoke(
        "--data", source, "--epochs", 1, "--arms", "none, learned", "--batch-size", 31, "--out", tmp_path / "r"
    )
    assert result.exit_code == 0, result.output
    *words, page = result.stdout.splitlines()
    assert page == str(tmp_path / "r" / "report.html")
    assert words[0].startswith("With gamma and beta learned, ")
    at = words.index(f"The numbers of {tmp_path / 'r'}:")
    assert words[at + 1].startswith("- Test accuracy: none ")
    # 32 samples: the one that is left over joins the batch before it.
    assert "32 samples to train on in 1 batches of 32, 8 to test, 3 classes" in result.stderr


def test_without_the_report_extra_it_says_so_and_goes_on(source, tmp_path, monkeypatch, capsys):
    run = Experiment.begin(Settings(data=source, epochs=1, arms=("none",)), tmp_path / "run").run()
    monkeypatch.setitem(sys.modules, "batchnorm.view.page", None)
    monkeypatch.delitem(vars(bn.view), "report", raising=False)  # kept since another test
    assert _write_page(run) is None
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert line.count("pip install") == 1
    assert f"pip install 'batchnorm[report]', then batchnorm report {run.path}" in line
    assert train({}, resume=run.path, as_json=True) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["report"] is None
    assert err.startswith(f"{run.path}: finished already\n")
    (run.path / "report.html").write_text("the page")
    assert train({}, resume=run.path) == 0  # writes nothing
    assert (run.path / "report.html").read_text() == "the page"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--model", "rnn"], "--model: expected one of mlp, cnn, got 'rnn'"),
        (
            ["--arms", "learned,both"],
            "--arms: expected some of learned,fixed,per-batch,none, each once, got 'learned,both'",
        ),
        (["--batch-size", 1], "--batch-size: expected at least 2"),
        (["--data", "/nowhere"], "no data set or file /nowhere"),
        (["--resume", "/nowhere"], "--resume /nowhere: /nowhere is not a run"),
        (["--resume", "/nowhere", "--out", "/elsewhere"], "--out /elsewhere contradicts --resume /nowhere"),
    ],
)
def test_wrong_options_are_one_line(arguments, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert line in result.stderr
    assert result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_resume_with_another_setting_is_refused(source, tmp_path):
    run = Experiment.begin(Settings(data=source, epochs=1, arms=("none",)), tmp_path / "run").run()
    result = invoke("--resume", run.path, "--epochs", 2)
    assert result.exit_code == 2
    assert f"--epochs 2 contradicts {run.path}, which has 1" in result.stderr


def tick(step: int, accuracy: float | None = None, arm: str = "learned") -> Tick:
    return Tick(arm, epoch=1, epochs=2, step=step, steps=4, loss=0.5, accuracy=accuracy)


def test_plain_progress(capsys):
    with Progress(("learned", "none")) as progress:
        for step in (1, 2, 3, 4):
            progress(tick(step, 0.875 if step == 4 else None))
    out, err = capsys.readouterr()
    assert out == ""
    first, *_, last = err.splitlines()  # one in a while, so not all of them
    assert first == "learned (1/2): epoch 1/2, step 1/4, loss 0.5000, ? left"
    assert last.startswith("learned (1/2): epoch 1/2, step 4/4, loss 0.5000, accuracy 87.5 %, 0:00:0")
    assert len(err.splitlines()) == 2


def test_live_progress(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    with Progress(("learned", "none")) as progress:
        progress(tick(4, 0.5, arm="none"))
    out, err = capsys.readouterr()
    assert out == ""
    assert "none (2/2): epoch 1/2, step 4/4, loss 0.5000, accuracy 50.0 %" in err
    assert "\x1b" in err


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_a_live_line_is_never_cut(width, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", str(width))
    with Progress(("learned", "none")) as progress:
        progress(tick(4, 0.5, arm="none"))
    err = capsys.readouterr().err
    assert "none (2/2): epoch 1/2" in err
    assert "left" in err
    assert "…" not in err


def test_help_names_every_option():
    text = CliRunner().invoke(app, ["train", "--help"], env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}).stdout
    options = "data model arms epochs batch-size lr optimizer seed out resume json"
    assert all(f"--{option}" in text for option in options.split())
