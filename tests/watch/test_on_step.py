"""on_step=: every record as a plain dict, in the training's thread, and no error of it in the training."""

import threading

import numpy as np
import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.runs import QUANTITIES


def train(model, folder, on_step, steps=6, **options):
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with bn.watch(model, folder, optimizer=optimizer, on_step=on_step, **options) as w:
        for x in torch.randn(steps, 8, 3, generator=torch.Generator().manual_seed(0)):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
            w.flush()


def test_every_record_once_in_order_and_in_the_trainings_thread(tmp_path):
    model, seen, threads = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3, affine=False)), [], set()

    def on_step(numbers):
        seen.append(numbers)
        threads.add(threading.current_thread())

    train(model, tmp_path, on_step, every=2)
    run = bn.open_run(tmp_path)
    assert [numbers["step"] for numbers in seen] == run.steps.tolist() == [0, 2, 4]
    assert threads == {threading.main_thread()}
    for row, numbers in enumerate(seen):
        assert all(type(value) in (int, float) for value in numbers.values())
        for quantity in QUANTITIES:
            columns = run.stats("0", quantity)[row]
            for name, value in (("mean", columns[7]), ("min", columns[0]), ("max", columns[6])):
                assert numbers[f"bn/0/{quantity}_{name}"] == value
        assert "bn/1/batch_var_mean" in numbers
        assert "bn/1/gamma_mean" not in numbers  # there is none
        assert not any("nonfinite" in name for name in numbers)


def test_they_come_while_the_training_goes_on(tmp_path):
    model, seen, at = nn.BatchNorm1d(3), [], []
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with bn.watch(model, tmp_path, optimizer=optimizer, on_step=seen.append) as w:
        for _ in range(4):
            model(torch.randn(8, 3)).sum().backward()
            optimizer.step()
            w.flush()
            at.append(len(seen))
    assert at == [0, 1, 2, 3]  # at the end of the next step
    assert len(seen) == 4


def test_what_is_not_finite_is_counted(tmp_path):
    model, seen = nn.BatchNorm1d(3), []
    with torch.no_grad():
        model.weight[1] = float("nan")
        model.bias[:] = float("inf")
    train(model, tmp_path, seen.append, steps=1)
    (numbers,) = seen
    assert (numbers["bn/BatchNorm1d/gamma_mean"], numbers["bn/BatchNorm1d/gamma_nonfinite"]) == (1.0, 1.0)
    assert numbers["bn/BatchNorm1d/beta_nonfinite"] == 3.0
    assert "bn/BatchNorm1d/beta_mean" not in numbers
    assert all(np.isfinite(value) for value in numbers.values())


def test_an_error_is_a_warning_and_the_training_goes_on(tmp_path):
    model, seen = nn.BatchNorm1d(3), []

    def on_step(numbers):
        seen.append(numbers)
        raise ConnectionError("no network")

    with pytest.warns(RuntimeWarning, match=r"on_step raised, the training goes on: ConnectionError\('no network'\)"):
        train(model, tmp_path, on_step)
    assert len(seen) == 6  # and the next record is tried again
    assert len(bn.open_run(tmp_path).steps) == 6


def test_to_tensorboard(tmp_path):
    """The recipe of docs/recording.md with a real logger."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(tmp_path / "events") as writer:

        def on_step(numbers):
            step = numbers.pop("step")
            for name, value in numbers.items():
                writer.add_scalar(name, value, step)

        train(nn.BatchNorm1d(3), tmp_path / "run", on_step)
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    found = events.Scalars("bn/BatchNorm1d/running_var_mean")
    run = bn.open_run(tmp_path / "run")
    assert [event.step for event in found] == run.steps.tolist()
    assert [event.value for event in found] == run.stats("BatchNorm1d", "running_var")[:, 7].tolist()


def test_a_callable_is_asked_for(tmp_path):
    with pytest.raises(TypeError, match="on_step must be callable with a dict, got dict"):
        bn.watch(nn.BatchNorm1d(3), tmp_path / "run", on_step={})
    assert not (tmp_path / "run").exists()
