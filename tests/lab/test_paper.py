"""The experiment of Ioffe & Szegedy 2015, section 4.1: counted in steps, with what reaches a sigmoid recorded."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from batchnorm.cli import app
from batchnorm.lab import Experiment, Settings, build, load
from batchnorm.lab.clock import Clock
from batchnorm.lab.designs import DESIGNS
from batchnorm.lab.evaluation import INPUT_PERCENTILES, UNIT, evaluate, input_percentiles
from batchnorm.lab.training import CHECKPOINT

STEPS = 101  # a test every 2 steps, and after the last, which is none of those


@pytest.fixture(scope="module")
def settings(source):
    return Settings("paper", data=source, steps=STEPS, batch_size=8, seed=3)


@pytest.fixture(scope="module")
def whole(settings, tmp_path_factory):
    return Experiment.begin(settings, tmp_path_factory.mktemp("runs") / "whole").run()


def test_what_it_is(settings):
    assert settings.arms == ("learned", "none")
    assert (settings.optimizer, settings.model, settings.epochs, Settings("paper").steps) == ("sgd", "mlp", None, 3000)
    assert Settings("paper").batch_size == 60
    model = build("mlp", (1, 28, 28), 10, norm=False, **DESIGNS["paper"].network)
    assert model[3].weight.shape == (100, 100)
    assert model[3].weight.std().item() == pytest.approx(0.1, rel=0.03)  # of 10,000: 4 standard errors of a deviation


def test_it_ends_at_the_step_and_is_tested_at_equal_distances(whole):
    for arm in ("learned", "none"):
        found = whole.results["arms"][arm]
        assert found["steps"] == STEPS
        assert found["curve"]["step"] == [*range(2, STEPS, 2), STEPS]
        assert {len(values) for values in found["curve"].values()} == {51}
    rates = {line["lr"] for line in whole.arms["learned"].scalars() if "lr" in line}
    assert rates == {0.1}  # it does not fall


@pytest.mark.parametrize("arm", ["learned", "none"])
def test_the_percentiles_are_those_of_the_last_hidden_layers_unit(whole, settings, arm):
    """Worked out again from the checkpoint, in float64 and by NumPy."""
    data = load(settings.data)
    model = build("mlp", data.shape, len(data.classes), norm=arm != "none").double()
    tensors = torch.load(whole.path / arm / CHECKPOINT, weights_only=True)["tensors"]
    model.load_state_dict({name.removeprefix("model."): value for name, value in tensors.items()})
    with torch.no_grad():
        reached = model.eval()[:-2](data.x_test.double())[:, UNIT].numpy()
    curve = whole.results["arms"][arm]["curve"]
    for name, share in INPUT_PERCENTILES.items():
        assert curve[name][-1] == pytest.approx(np.quantile(reached, share), abs=1e-5)
    assert curve["input_p15"][-1] < curve["input_p50"][-1] < curve["input_p85"][-1]


def test_a_network_without_such_a_unit_has_no_percentiles():
    with input_percentiles(build("cnn", (1, 8, 8), 3)) as percentiles:
        pass
    assert percentiles == {}
    model = build("mlp", (4,), 3)
    with input_percentiles(model) as percentiles:
        evaluate(model, torch.randn(5, 4), torch.zeros(5, dtype=torch.int64))
    assert len(percentiles) == 3
    assert not model[-2]._forward_pre_hooks


@pytest.mark.parametrize("step", [49, 100])
def test_stopped_between_tests_it_ends_on_the_same_bits(settings, whole, tmp_path, step):
    def stop(tick):
        if (tick.arm, tick.step) == ("none", step):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Experiment.begin(settings, tmp_path / "run").run(stop, checkpoint_seconds=0.0)
    run = Experiment.resume(tmp_path / "run").run()
    for arm, expected in whole.results["arms"].items():
        assert run.results["arms"][arm]["weights_sha256"] == expected["weights_sha256"]
        assert run.results["arms"][arm]["curve"] == expected["curve"]


def test_the_command(source, tmp_path, monkeypatch):
    monkeypatch.setattr("batchnorm.lab.command._write_page", lambda run: None)
    arguments = ["train", "--data", source, "--experiment", "paper", "--steps", "20", "--out", str(tmp_path / "run")]
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["arms"] == found["experiments"]["paper"]["arms"]
    assert list(found["arms"]) == ["learned", "none"]
    assert "section 4.1 of Ioffe & Szegedy 2015, mlp on" in result.stderr


@pytest.mark.parametrize("name", DESIGNS)
def test_the_help_names_every_experiment(name):
    result = CliRunner().invoke(app, ["train", "--help"], env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})
    assert f"{name}:" in result.stdout


@pytest.mark.parametrize("steps", [1, 7, 99, 100, 101, 250])
def test_the_clock_counts_as_a_loop_does(steps):
    clock = Clock.of(None, steps, epoch_steps=24)
    tested, since = [], 0
    for step in range(1, steps + 1):
        since += 1
        assert clock.since_test(step) == since
        if step % clock.interval == 0 or step == steps:
            tested.append(step)
            assert clock.is_test(step)
            since = 0
        assert clock.tests(step) == tested
    assert len(tested) <= 100
    assert clock.epochs == len(range(0, steps, 24))
