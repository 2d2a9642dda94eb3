"""`batchnorm list`, `show`, `report`: what they print, how they fail, and that reading a run never imports torch."""

import json
import os
import resource
import subprocess
import sys

import pytest
from synthetic import layer, story, write_run
from typer.testing import CliRunner

import batchnorm as bn
from batchnorm.cli import app

# Python runs this before the command: whoever asks for torch gets an error instead.
BLOCKER = """
import sys
from importlib.abc import MetaPathFinder
class Blocker(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "pandas", "scipy", "sklearn", "matplotlib"):
            raise AssertionError(f"{name} was imported")
sys.meta_path.insert(0, Blocker())
from batchnorm.cli import app
app()
"""


def run(*arguments, code=BLOCKER):
    """Run the command in a Python of its own: (exit status, stdout, stderr, seconds of processor time)."""
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    environment.pop("COLUMNS", None)  # a pipe: a line for each run
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, encoding="utf-8", env=environment
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return done.returncode, done.stdout, done.stderr, seconds


@pytest.mark.processes
def test_the_blocker_blocks():
    status, _, stderr, _ = run(code=BLOCKER.replace("from batchnorm.cli", "import torch\nfrom batchnorm.cli"))
    assert status != 0
    assert "torch was imported" in stderr


@pytest.mark.processes
def test_list_without_torch(run_path, experiment_path, tmp_path):
    for path in (run_path, experiment_path):
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "not-a-run").mkdir()
    status, stdout, stderr, seconds = run("list", tmp_path)
    assert (status, stderr) == (0, "")
    lines = {os.path.basename(line.split()[0]): line for line in stdout.splitlines()}
    assert {"run", "experiment"} <= set(lines)
    assert "not-a-run" not in lines
    assert "learned 98.0%" in lines["experiment"]
    assert seconds < 2  # of processor time, which a busy machine does not stretch as it does the clock's

    status, stdout, _, _ = run("list", tmp_path, "--json")
    told = {os.path.basename(each["path"]): each for each in json.loads(stdout)}
    assert told["run"]["steps"] == 30
    assert told["run"]["layers"] == 2
    assert told["experiment"]["test_accuracy"] == {"learned": 0.98, "fixed": 0.97, "per-batch": 0.9, "none": 0.8}


@pytest.mark.processes
def test_show_without_torch(run_path, experiment_path):
    status, stdout, stderr, seconds = run("show", run_path)
    assert (status, stderr) == (0, "")
    assert "net.bn1" in stdout
    assert "no NaN or infinity in 30 recorded steps" in stdout
    assert "digits" in stdout
    assert seconds < 2

    opened = bn.open_run(run_path)
    status, stdout, _, _ = run("show", run_path, "--json")
    told = json.loads(stdout)
    assert [each["name"] for each in told["layers"]] == ["net.bn1", "net.bn2"]
    gamma = opened.stats("net.bn1", "gamma")
    assert told["layers"][0]["gamma"]["first"]["p50"] == gamma[0, 3]
    assert told["layers"][0]["gamma"]["last"]["p95"] == gamma[-1, 5]

    status, stdout, _, _ = run("show", experiment_path)
    assert status == 0
    assert "per-batch" in stdout
    assert "90.00%" in stdout


@pytest.mark.processes
def test_report_without_torch(run_path, tmp_path):
    out, png = tmp_path / "page.html", tmp_path / "main.png"
    status, stdout, stderr, _ = run("report", run_path, "--out", out)
    assert (status, stdout, stderr) == (0, f"{out}\n", "")
    assert out.read_text(encoding="utf-8").startswith("<!doctype html>")

    status, stdout, _, _ = run("report", run_path, "--out", out, "--png", png, "--json")
    assert status == 0
    assert json.loads(stdout) == {"report": str(out), "png": str(png)}
    assert png.read_bytes().startswith(b"\x89PNG\r\n")


@pytest.mark.processes
def test_report_of_several_runs_without_torch(run_path, experiment_path, tmp_path):
    out = tmp_path / "page.html"
    status, stdout, stderr, _ = run("report", run_path, experiment_path, "--out", out)
    assert (status, stdout, stderr) == (0, f"{out}\n", "")
    assert "2 trainings side by side" in out.read_text(encoding="utf-8")


@pytest.mark.processes
def test_markdown_without_torch(run_path, tmp_path):
    status, stdout, stderr, seconds = run("report", run_path, "--format", "markdown")
    assert (status, stderr) == (0, "")
    assert stdout.startswith("### Batch normalization in `run`\n")
    assert "| `net.bn2` | 3 |" in stdout
    assert seconds < 3
    out = tmp_path / "new" / "run.md"
    status, told, _, _ = run("report", run_path, "--format", "markdown", "--out", out, "--json")
    assert (status, json.loads(told)) == (0, {"markdown": str(out)})
    assert out.read_text(encoding="utf-8") == stdout
    info = layer("bn", 3)
    values = story(info, 40)
    values["running_var"][9:, 1] = float("nan")
    stdout = run("report", write_run(tmp_path / "broken", [info], [values]), "--format", "markdown")[1]
    assert "**serious: nonfinite**, bn, since step 9:" in stdout, "what diagnose finds is in it"


@pytest.mark.parametrize("command", ["show", "report"])
def test_paths_that_are_no_runs_get_one_line(command, tmp_path):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "run.json").write_text('{"format": 1, "layers": [3]}')
    (tmp_path / "file").write_text("x")
    for path in (tmp_path, tmp_path / "missing", tmp_path / "file", tmp_path / "bad"):
        result = CliRunner().invoke(app, [command, str(path)])
        assert result.exit_code == 1
        assert result.stdout == ""
        assert len(result.stderr.splitlines()) == 1
        assert str(path) in result.stderr
    assert not (tmp_path / "missing").exists()


def test_wrong_usage_is_status_2():
    for arguments in (["show"], ["report", "x", "--no-such-option"], ["no-such-command"]):
        assert CliRunner().invoke(app, arguments).exit_code == 2


def test_reports_that_cannot_be_are_one_line_and_status_2(run_path):
    for arguments, words in (
        ([], "name a RUN, or --sample"),
        ([run_path, "--sample"], "leave RUN out"),
        ([run_path, "--format", "pdf"], "--format must be html or markdown, got 'pdf'"),
        ([run_path, run_path, "--format", "markdown"], "--format markdown shows one run, got 2"),
        ([run_path, run_path, "--png", "x.png"], "--png shows one run, got 2"),
    ):
        result = CliRunner().invoke(app, ["report", *map(str, arguments)])
        assert (result.exit_code, result.stdout) == (2, "")
        (line,) = result.stderr.splitlines()
        assert words in line


def test_version():
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.stdout) == (0, f"batchnorm {bn.__version__}\n")


def test_list_of_an_empty_and_of_no_folder(tmp_path):
    result = CliRunner().invoke(app, ["list", str(tmp_path)])
    assert result.exit_code == 0
    assert "No runs" in result.stdout
    result = CliRunner().invoke(app, ["list", str(tmp_path / "missing")])
    assert result.exit_code == 1
    assert "missing" in result.stderr


def test_a_folder_that_cannot_be_written_is_one_line(run_path, tmp_path):
    (tmp_path / "file").write_text("")
    result = CliRunner().invoke(app, ["report", str(run_path), "--out", str(tmp_path / "file" / "page.html")])
    assert result.exit_code == 1
    assert len(result.stderr.splitlines()) == 1


def test_names_steer_neither_the_terminal_nor_json(tmp_path):
    name = "[bold]x[/bold]\x1b[2J\x1b]0;owned\x07\n"
    info = layer(name, 2)
    values = story(info, 3)
    values["gamma"][:] = float("nan")
    alerts = [{"step": 0, "layer": name, "quantity": "gamma", "what": "nonfinite", "count": 2}]
    meta = {"note": name, "loss": float("nan")}
    path = write_run(tmp_path / "run", [info], [values], meta=meta, alerts=alerts)
    result = CliRunner().invoke(app, ["show", str(path)])
    assert result.exit_code == 0
    assert "\x1b" not in result.stdout
    assert "\x07" not in result.stdout
    assert "[bold]x" in result.stdout
    result = CliRunner().invoke(app, ["show", str(path), "--json"])

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    told = json.loads(result.stdout, parse_constant=refuse)
    assert told["layers"][0]["name"] == name
    assert told["layers"][0]["gamma"]["last"] == {"p05": None, "p50": None, "p95": None}
    assert told["meta"]["loss"] is None


@pytest.mark.processes
def test_show_counts_the_steps_that_were_not_finite_and_ends_where_the_run_ended(tmp_path):
    info = layer("bn", 3)
    values = story(info, 40)
    values["gamma"][4:] = float("nan")
    values["beta"][7, 1] = float("inf")
    # The recorder writes an alert only when the count changes: one line for 36 steps.
    alerts = [{"step": 4, "layer": "bn", "quantity": "gamma", "what": "nonfinite", "count": 3}]
    path = write_run(tmp_path / "run", [info], [values], alerts=alerts)
    stdout = run("show", path)[1]
    assert "bn: gamma not finite in 36 recorded steps, first at step 4" in stdout
    assert "bn: beta not finite in 1 recorded step, first at step 7" in stdout
    assert "1 → NaN" in stdout
    assert "1 with NaN or infinite values" in stdout


def test_list_prints_paths_that_show_accepts_however_narrow_the_terminal(tmp_path, monkeypatch):
    name = "a-run-with-quite-a-long-name-" * 3
    write_run(tmp_path / "runs" / name, meta={})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "40")
    stdout = CliRunner().invoke(app, ["list"]).stdout
    path = stdout.splitlines()[0]  # no table fits
    assert path == os.path.join("runs", name)
    assert CliRunner().invoke(app, ["show", path]).exit_code == 0
    (tmp_path / name).mkdir()  # a folder of the same name that is no run
    for command in ("show", "report"):
        assert CliRunner().invoke(app, [command, name]).exit_code == 0
    assert (tmp_path / "runs" / name / "report.html").is_file()


def test_errors_name_the_target_and_the_cure(run_path, tmp_path, monkeypatch):
    def said(*arguments):
        result = CliRunner().invoke(app, [*map(str, arguments)])
        assert (result.exit_code, result.stdout) == (1, "")
        (line,) = result.stderr.splitlines()
        return line

    assert f"there is no folder {tmp_path / 'nope'}" in said("show", tmp_path / "nope")
    line = said("report", run_path, "--out", tmp_path)
    assert f"{tmp_path} is a folder" in line
    assert f"--out {tmp_path / 'report.html'}" in line
    line = said("report", run_path, "--png", tmp_path / "m.jpg")
    assert "must end in .png" in line
    assert str(tmp_path / "m.png") in line

    def refuse(path, data):
        raise PermissionError(13, "Permission denied", str(path.with_name(f".{path.name}.123")))

    monkeypatch.setattr("batchnorm.view.page.write_atomically", refuse)  # root may write everywhere
    line = said("report", run_path, "--out", tmp_path / "page.html")
    assert f"no permission to write {tmp_path / 'page.html'}" in line
    assert "--out" in line


def test_without_the_extra_the_cure_is_named(run_path, monkeypatch):
    monkeypatch.setattr("batchnorm.view.page.find_spec", lambda name: None)
    result = CliRunner().invoke(app, ["report", str(run_path)])
    assert result.exit_code == 1
    assert 'pip install "batchnorm[report]"' in result.stderr
    assert CliRunner().invoke(app, ["show", str(run_path)]).exit_code == 0
