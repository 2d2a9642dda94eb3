"""kill -9 at random moments: what is on disk is a beginning of what an undisturbed run writes, and reads as such."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.runs.schema import HISTOGRAMS, OPTIMIZERS, PROBES, SCALARS, STATS, UPDATES, VECTORS

pytestmark = pytest.mark.processes

KILLS = 24


@pytest.fixture(scope="module")
def trainings(tmp_path_factory):
    root = tmp_path_factory.mktemp("killed")
    subprocess.run([sys.executable, Path(__file__).with_name("killed_training.py"), root, str(KILLS)], check=True)
    return root


def test_every_killed_run_reads_up_to_its_last_whole_frame(trainings):
    whole = bn.open_run(trainings / "whole")
    assert whole.status == "finished"
    assert whole.steps.tolist() == list(range(400))
    reached = []
    for k in range(KILLS):
        folder = trainings / f"killed-{k}"
        if not (folder / "run.json").exists():  # killed before the run began
            continue
        run = bn.open_run(folder)
        assert run.status == "interrupted"
        assert run.steps.tolist() == list(range(len(run.steps)))
        for name in (STATS, VECTORS, PROBES, HISTOGRAMS, UPDATES, OPTIMIZERS, SCALARS):
            found = (folder / name).read_bytes() if (folder / name).exists() else b""
            assert (trainings / "whole" / name).read_bytes().startswith(found), name
        assert len(run.stats("1", "gamma")) == len(run.steps)
        assert not any("lacks lines" in line for line in run.damage)
        reached.append(len(run.steps))
    # Kills fell before, within and between writes: the runs differ, and most got somewhere.
    assert len(set(reached)) > 3
    assert max(reached) > 0


def test_little_is_lost(trainings):
    """Steps taken longer before the kill than the writer lingers are on disk: 0.05 s, 20 times that if all is busy."""
    for k in range(KILLS):
        taken = trainings / f"killed-{k}.taken"
        words = taken.read_text().split() if taken.exists() else []
        if len(words) < 2:
            continue
        run = bn.open_run(trainings / f"killed-{k}")
        # Whatever is lost is a tail; logged numbers do not wait in a queue, so at most the line being written is.
        assert len(run.scalars()) >= int(words[0])
        if float((trainings / f"killed-{k}.at").read_text()) - float(words[1]) > 1.0:
            assert len(run.steps) >= int(words[0])


def test_a_killed_run_goes_on(trainings):
    folder = max((trainings / f"killed-{k}" for k in range(KILLS)), key=_steps)
    with open(folder / STATS, "ab") as file:
        file.write(b"\0" * 100)
    at = _steps(folder) // 2
    model = nn.Sequential(nn.Linear(4, 30), nn.BatchNorm1d(30), nn.ReLU(), nn.Linear(30, 5), nn.BatchNorm1d(5))
    with bn.watch(model, folder, resume_step=at):
        model(torch.ones(3, 4))
    run = bn.open_run(folder)
    assert run.steps.tolist() == list(range(at + 1))
    assert (run.status, run.damage) == ("finished", [])
    assert [row["step"] for row in run.scalars()] == list(range(at))


def _steps(folder):
    return len(bn.open_run(folder).steps) if (folder / "run.json").exists() else -1


def test_a_program_that_ends_without_close(tmp_path):
    """The end of a forked child does not end the run; that of the program does, and all that was recorded is there."""
    program = (
        "import os, sys, torch, batchnorm as bn\n"
        f"model = torch.nn.BatchNorm1d(3); w = bn.watch(model, {str(tmp_path / 'run')!r})\n"
        "for _ in range(5): model(torch.randn(4, 3))\n"
        "child = os.fork()\n"
        "if not child: sys.exit()\n"
        "os.waitpid(child, 0)\n"
        "assert bn.open_run(w.path).status == 'running'\n"
        "model(torch.randn(4, 3))\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    run = bn.open_run(tmp_path / "run")
    assert (run.status, run.steps.tolist(), run.damage) == ("interrupted", list(range(6)), [])
