"""Going on with a run: after a resume its files are those of a training that was never interrupted, byte for byte."""

import json
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.runs.schema import ALERTS, HISTOGRAMS, OPTIMIZERS, PROBES, SCALARS, STATS, UPDATES, VECTORS

FILES = (STATS, VECTORS, PROBES, HISTOGRAMS, UPDATES, SCALARS, ALERTS, OPTIMIZERS)


def train(folder, start, stop, checkpoint, *, resume=False, every=1):
    """Steps start to stop, from a checkpoint or from scratch; returns the checkpoint at the end."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, affine=False), nn.BatchNorm1d(3), nn.Linear(3, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    if checkpoint:
        model.load_state_dict(checkpoint[0])
        optimizer.load_state_dict(checkpoint[1])
    # A budget of four frames at first, so that the schedule thins within the test.
    with bn.watch(
        model, folder, optimizer=optimizer, resume_step=start if resume else None, vector_bytes=70 * 212, every=every
    ) as w:
        assert w.step == start
        for k in range(start, stop):
            x = torch.randn(8, 4, generator=torch.Generator().manual_seed(k))
            if k == 7:
                x[0, 0] = float("nan")
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            if k < 7:
                optimizer.step()
            else:  # keeps the weights finite: a step of 0
                optimizer.zero_grad()
                optimizer.step()
            w.log(loss=loss.item() if k < 7 else 0.0)
            if k % 4 == 3 and k < 7:
                w.probe([x, x + 1])
    return model.state_dict(), optimizer.state_dict()


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("at", [0, 1, 6, 8])
def test_resumed_is_as_never_interrupted(tmp_path, at, every):
    train(tmp_path / "whole", 0, 20, None, every=every)
    checkpoint = train(tmp_path / "unrelated", 0, at, None, every=every) if at else None
    train(tmp_path / "resumed", 0, 9, None, every=every)  # ran on to 9 after the checkpoint, and died
    with open(tmp_path / "resumed" / STATS, "ab") as file:
        file.write(b"BNJ1 and then the lights went out")
    with open(tmp_path / "resumed" / SCALARS, "ab") as file:
        file.write(b'{"step":9,"lo')
    assert len(bn.open_run(tmp_path / "resumed").damage) == 2
    train(tmp_path / "resumed", at, 20, checkpoint, resume=True, every=every)
    for name in FILES:
        assert (tmp_path / "resumed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    run = bn.open_run(tmp_path / "resumed")
    assert (run.status, run.damage) == ("finished", [])
    assert run.steps.tolist() == list(range(0, 20, every))
    assert len(run.vectors("2", "gamma")[0]) < len(run.steps) or every == 2
    assert run.alerts()


def test_other_layers_are_refused_and_nothing_is_touched(tmp_path):
    train(tmp_path, 0, 5, None)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for model in (nn.BatchNorm1d(3), nn.Sequential(nn.Identity(), nn.BatchNorm1d(3), nn.BatchNorm1d(4))):
        with pytest.raises(ValueError, match="other layers"):
            bn.watch(model, tmp_path, resume_step=2)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_meta_and_creation_survive(tmp_path):
    model = nn.BatchNorm1d(3)
    bn.watch(model, tmp_path, meta={"lr": 0.1, "seed": 1}).close("interrupted")
    first = bn.open_run(tmp_path)
    with bn.watch(model, tmp_path, meta={"seed": 2}, resume_step=0):
        model(torch.randn(4, 3))
        assert bn.open_run(tmp_path).status == "running"
    run = bn.open_run(tmp_path)
    assert (run.created, run.meta, run.status) == (first.created, {"lr": 0.1, "seed": 2}, "finished")
    assert np.isclose(json.loads((tmp_path / "run.json").read_bytes())["layers"][0]["eps"], 1e-5)


# Holds a folder, in a process of its own, without torch; a forked child, like a DataLoader's worker, outlives it.
HOLD = """
import os, sys, time
from pathlib import Path
from batchnorm.runs.lock import Lock
lock = Lock(Path(sys.argv[1]))
if os.fork():
    print("held", flush=True)
time.sleep(20)
"""


@pytest.mark.processes
def test_a_run_that_another_process_writes_is_refused_until_it_is_killed(tmp_path):
    train(tmp_path, 0, 5, None)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        with pytest.raises(
            BlockingIOError, match=rf"^{tmp_path} is being written by another process \(pid {holder.pid}\)"
        ):
            train(tmp_path, 5, 6, None, resume=True)
        assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        holder.kill()
        holder.wait()
        train(tmp_path, 5, 6, None, resume=True)
    finally:
        os.killpg(holder.pid, signal.SIGKILL)  # the child too
        assert holder.stdout is not None
        holder.stdout.close()


def test_one_recorder_a_folder(tmp_path, monkeypatch):
    model = nn.BatchNorm1d(3)
    with bn.watch(model, tmp_path):
        model(torch.randn(4, 3))
        with pytest.raises(BlockingIOError, match="is being written by this process"):
            bn.watch(model, tmp_path, resume_step=0)
        monkeypatch.setattr("batchnorm.runs.lock._fcntl", None)  # as on Windows: it cannot be known
        bn.watch(model, tmp_path, resume_step=0).close("interrupted")


def test_a_run_is_running_as_long_as_its_lock_is_held(tmp_path):
    w = bn.watch(nn.BatchNorm1d(3), tmp_path)
    assert bn.open_run(tmp_path).status == "running"
    w._lock.release()  # what the system does when the process is killed
    assert bn.open_run(tmp_path).status == "interrupted"
    w.close("failed")
    assert bn.open_run(tmp_path).status == "failed"


def test_who_asks_for_the_lock_is_in_nobodys_way(tmp_path):
    from batchnorm.runs.lock import Lock, is_held

    Lock(tmp_path).release()
    done = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(lambda: [is_held(tmp_path) for _ in iter(done.is_set, True)])
        for _ in range(300):
            Lock(tmp_path).release()
        done.set()
        assert len(asked.result()) > 1
    assert is_held(tmp_path) is False
    assert is_held(tmp_path / "nowhere") is None
