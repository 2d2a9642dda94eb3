"""Nothing that recording does raises into, replaces an exception of, or blocks the training."""

import os
import shutil
import signal
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.runs.lines import Lines
from batchnorm.watch.capture import Capture
from batchnorm.watch.hooks import LayerWatch

STOPPED = "recording to .* stopped, the training goes on"


def build():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def take_steps(model, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()


LIMITED = """
import resource, sys, warnings
import torch, batchnorm as bn
model = torch.nn.Sequential(torch.nn.Linear(4, 64), torch.nn.BatchNorm1d(64))
optimizer = torch.optim.SGD(model.parameters(), 0.1)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    with bn.watch(model, sys.argv[1], optimizer=optimizer) as w:
        w.flush()
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
        for _ in range(200):
            model(torch.randn(8, 4)).square().mean().backward()
            optimizer.step()
            if sys.argv[3] == "log":
                w.log(loss=1.0)
        taken = w.step
print(taken, [str(warning.message) for warning in caught])
"""


@pytest.mark.processes
@pytest.mark.skipif(sys.platform == "win32", reason="Windows limits no file's size")
# Not even run.json can be written at the end; or that alone.
@pytest.mark.parametrize(("log", "size"), [("log", 10), ("no log", 1000)])
def test_files_that_cannot_grow_cost_one_warning(tmp_path, log, size):
    args = [sys.executable, "-c", LIMITED, str(tmp_path / "run"), str(size), log]
    done = subprocess.run(args, capture_output=True, text=True, timeout=60)
    taken, _, said = done.stdout.partition(" ")
    assert (done.stderr, taken) == ("", "200")
    assert (said.count("stopped, the training goes on"), said.count("', '")) == (1, 0)
    assert bn.open_run(tmp_path / "run").status == ("interrupted" if size == 10 else "finished")


def test_after_a_failed_log_no_line_follows_the_torn_one(tmp_path, monkeypatch):
    model, optimizer = build()
    with bn.watch(model, tmp_path, optimizer=optimizer) as w:
        w.log(a=1)
        with monkeypatch.context() as patch:
            patch.setattr(Lines, "append", lambda self, rows: os.write(self._file, b'{"st') and os.fsync(-1))
            with pytest.warns(RuntimeWarning, match=STOPPED):
                w.log(a=2)
        w.log(a=3)
        take_steps(model, optimizer, 2)
        assert w.step == 2
    run = bn.open_run(tmp_path)
    assert run.scalars() == [{"step": 0, "a": 1}]
    assert len(run.steps) == 0


def test_another_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    model, optimizer = build()
    for resume_step, steps in ((None, [0]), (1, [0, 1])):
        with bn.watch(model, "run", optimizer=optimizer, resume_step=resume_step):
            os.chdir("sub")
            take_steps(model, optimizer, 1)
        os.chdir("..")
        run = bn.open_run("run")
        assert (run.status, run.steps.tolist()) == ("finished", steps)


@pytest.mark.parametrize("action", ["always", "error"])
def test_a_deleted_folder_hides_no_exception(tmp_path, action):
    model, optimizer = build()
    with warnings.catch_warnings(record=True):
        warnings.simplefilter(action)
        w = bn.watch(model, tmp_path / "a", optimizer=optimizer)
        shutil.rmtree(w.path)
        with pytest.raises(KeyError, match="mine"), w:
            raise KeyError("mine")
    w = bn.watch(model, tmp_path / "b", optimizer=optimizer)
    take_steps(model, optimizer, 1)
    shutil.rmtree(w.path)
    with pytest.warns(RuntimeWarning, match=STOPPED):
        w.close()
    assert len(model[1]._forward_hooks) == len(optimizer._optimizer_step_pre_hooks) == 0


@pytest.mark.parametrize("text", ["", "[]", "[" * 100_000])
def test_a_description_that_somebody_broke(tmp_path, text):
    model, optimizer = build()
    w = bn.watch(model, tmp_path, optimizer=optimizer)
    (tmp_path / "run.json").write_text(text)
    with pytest.warns(RuntimeWarning, match=STOPPED):
        w.close()
    assert not model[1]._forward_hooks


@pytest.mark.parametrize(
    ("owner", "name"),
    [(LayerWatch, "_moment"), (Capture, "take"), (Capture, "add_gradients"), (Capture, "forwards"), (Capture, "begin")],
)
@pytest.mark.parametrize("given", [True, False])
def test_what_fails_in_a_hook_stops_the_recording_alone(tmp_path, monkeypatch, owner, name, given):
    def fail(self, *args, **kwargs):
        raise RuntimeError("out of memory")

    (model, optimizer), (alone, its) = build(), build()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with bn.watch(model, tmp_path, optimizer=optimizer if given else None) as w:
            monkeypatch.setattr(owner, name, fail)
            torch.manual_seed(1)
            take_steps(model, optimizer, 5)
            assert w.step == 5
    torch.manual_seed(1)
    take_steps(alone, its, 5)
    assert torch.equal(model[0].weight, alone[0].weight)
    reached = not (given and name == "add_gradients")  # there the gradients are taken with the rest
    assert [str(warning.message).endswith("RuntimeError('out of memory')") for warning in caught] == [True] * reached
    assert bn.open_run(tmp_path).status == "finished"


@pytest.mark.processes
@pytest.mark.skipif(not hasattr(os, "fork"), reason="a system without fork")
def test_a_forked_child_trains_on_and_leaves_the_run_to_its_parent(tmp_path):
    model, optimizer = build()
    told = []
    with bn.watch(model, tmp_path, optimizer=optimizer, on_step=told.append) as w:
        take_steps(model, optimizer, 3)
        w.flush()
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            try:
                signal.alarm(20)  # it hung
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    w.log(child=1)
                    told.clear()
                    # More than the queue holds; and nothing of torch's that has threads, which a fork has not.
                    torch.set_num_threads(1)
                    take_steps(model, optimizer, 600)
                    w.flush()
                    w.close()
                said = ["a forked process records nothing" in str(warning.message) for warning in caught]
                os._exit(0 if said == [True] and w.step == 603 and not told else 1)
            finally:
                os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        take_steps(model, optimizer, 1)
    run = bn.open_run(tmp_path)
    assert (run.status, run.steps.tolist(), run.scalars()) == ("finished", [0, 1, 2, 3], [])


def test_an_optimizers_argument_that_is_no_closure_reaches_it(tmp_path):
    class Scaled(torch.optim.SGD):
        def step(self, factor):
            assert factor == 0.5

    model, _ = build()
    optimizer = Scaled(model.parameters(), lr=0.1)
    with bn.watch(model, tmp_path, optimizer=optimizer) as w:
        model(torch.randn(8, 4))
        optimizer.step(0.5)
        assert w.step == 1
