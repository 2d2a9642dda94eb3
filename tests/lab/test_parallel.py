"""Training on several real processes: where one process would end, killed and resumed too."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import ranks
import torch

import batchnorm as bn
from batchnorm.lab import Experiment, LabError, Settings
from batchnorm.lab.command import train
from batchnorm.lab.parallel import joined
from batchnorm.lab.training import CHECKPOINT

ARMS = ("learned", "fixed", "none")
# 26 samples to train on in batches of 23 and 3: of 6, 6, 6, 5 and of 1, 1, 1, 0 on four ranks.
BATCH = 23


def settings_for(source, processes):
    return Settings(data=source, epochs=3, batch_size=BATCH, seed=7, arms=ARMS, processes=processes)


def begun(rank, source, folder, world, kill=None):
    """Begin the experiment; the second rank dies at a step of an arm, if asked to."""

    def on_step(tick):
        if rank == 1 and (tick.arm, tick.step) == kill:
            os.kill(os.getpid(), signal.SIGKILL)

    with joined(True):
        experiment = Experiment.begin(settings_for(source, world), folder)
        return hashes(experiment.run(on_step, checkpoint_seconds=0.0))


def resumed(rank, folder):
    return hashes(Experiment.resume(folder).run(checkpoint_seconds=0.0))


def hashes(run):
    return {arm: found["weights_sha256"] for arm, found in run.results["arms"].items()}


def weights(folder, arm):
    state = torch.load(folder / arm / CHECKPOINT, weights_only=True)
    return {**state["tensors"], "losses": torch.tensor(state["losses"])}


@pytest.fixture(scope="module")
def four(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "four"
    return folder, ranks.run(begun, 4, source, str(folder), 4)


@pytest.mark.processes
def test_ends_with_the_weights_of_one_process(source, four, tmp_path):
    folder, found = four
    assert found[1:] == found[:1] * 3
    Experiment.begin(settings_for(source, 1), tmp_path / "one").run()
    for arm in ARMS:
        alone, together = weights(tmp_path / "one", arm), weights(folder, arm)
        for name, value in alone.items():
            # 6 steps of float32, each off by some ulps of numbers around 1, and more where a batch of 3 cancels
            torch.testing.assert_close(together[name], value, rtol=0, atol=2e-5)
    alone, together = (bn.open_run(path).arms["learned"] for path in (tmp_path / "one", folder))
    for layer in alone.layers:
        for quantity in ("batch_mean", "batch_var"):  # a probe is of the joined batch, not of a rank's share
            np.testing.assert_allclose(
                together.probes(layer.name, quantity)[1], alone.probes(layer.name, quantity)[1], rtol=1e-4, atol=2e-5
            )


@pytest.mark.processes
def test_every_rank_records_the_same_measurements(four):
    folder, _ = four
    first, *others = (bn.open_run(path) for path in (folder, *(folder / f"rank-{rank}" for rank in (1, 2, 3))))
    assert list(first.arms) == list(ARMS)
    for run in (first, *others):
        assert run.status == run.arms["learned"].status == "finished"
        assert run.arms["learned"].steps.tolist() == list(range(6))
        for quantity in ("batch_mean", "batch_var", "gamma", "running_mean"):
            np.testing.assert_array_equal(
                run.arms["learned"].vectors("bn2", quantity)[1], first.arms["learned"].vectors("bn2", quantity)[1]
            )
        for quantity in ("batch_mean", "batch_var"):
            np.testing.assert_array_equal(
                run.arms["learned"].probes("bn2", quantity)[1], first.arms["learned"].probes("bn2", quantity)[1]
            )
    assert not (folder / "rank-1" / "learned" / CHECKPOINT).exists()


@pytest.mark.processes
def test_killing_a_rank_ends_the_others_and_the_run_resumes(source, four, tmp_path):
    folder = tmp_path / "killed"
    found = ranks.outcomes(begun, 4, source, str(folder), 4, ("fixed", 3), timeout=10.0)
    assert found[1][1] == "died with exit code -9"
    for _, error in (found[0], *found[2:]):
        assert error.splitlines()[-1].startswith("batchnorm.lab.errors.LabError: another process ended")
    assert bn.open_run(folder).status == "failed"
    with pytest.raises(LabError, match=r"is trained on 4 processes, not 1; to continue: torchrun --nproc-per-node 4"):
        Experiment.resume(folder)
    assert ranks.run(resumed, 4, str(folder)) == four[1]
    for path in (folder, *(folder / f"rank-{rank}" for rank in (1, 2, 3))):
        assert bn.open_run(path).arms["fixed"].steps.tolist() == list(range(6))


def launched(*arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "batchnorm", "train"]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=200)


@pytest.mark.processes
def test_torchrun(source, tmp_path):
    path = tmp_path / "run"
    done = launched("--sync", "--data", source, "--arms", "learned", "--epochs", "2", "--out", str(path), "--json")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('"report"') == 1
    found = json.loads(done.stdout.splitlines()[-1])  # gloo of torch 2.10 says there who is connected
    assert list(found["arms"]) == ["learned"]
    assert Path(found["report"]).is_file()
    assert done.stderr.count("; on 2 processes") == 1
    assert bn.open_run(path / "rank-1").status == "finished"


def test_what_cannot_be_is_told(source, monkeypatch):
    with pytest.raises(LabError, match=r"--sync is for several processes: torchrun"):
        train({"data": source}, sync=True)
    with pytest.raises(LabError, match="no per-batch with --sync"):
        Settings(data=source, processes=2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(LabError, match="give --sync"):
        train({"data": source})
