"""The experiment in which gamma and beta alone learn: nothing else moves, and that is enough."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from batchnorm.cli import app
from batchnorm.lab import Experiment, LabError, Settings, build
from batchnorm.lab.training import CHECKPOINT

pytestmark = pytest.mark.slow

ARMS = ("learned", "fixed", "per-batch")


def invoke(*arguments: object):
    return CliRunner().invoke(app, ["train", *map(str, arguments)])


def tensors(path, arm):
    return torch.load(path / arm / CHECKPOINT, weights_only=True)["tensors"]


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_nothing_but_gamma_and_beta_moves(model, optimizer, source, tmp_path):
    settings = Settings("gamma-beta", data=source, model=model, epochs=3, batch_size=8, seed=5, optimizer=optimizer)
    assert settings.arms == ARMS
    run = Experiment.begin(settings, tmp_path / "run").run()
    began = build(model, (6,), 3, seed=5, wide=True).state_dict()
    for arm in ARMS:
        ended = {name.removeprefix("model."): value for name, value in tensors(run.path, arm).items()}
        for name, value in began.items():
            if "running" in name or "batches" in name:
                continue
            is_affine = name.startswith("bn")
            assert torch.equal(ended[name], value) is not (is_affine and arm != "fixed"), (arm, name)


def test_on_digits_they_are_enough(tmp_path):
    """Chance is 10 %; a third of the usual epochs keep the test short."""
    results = Experiment.begin(Settings("gamma-beta", epochs=20), tmp_path / "run").run().results["arms"]
    assert results["learned"]["test_accuracy"] > 0.9
    assert results["fixed"]["test_accuracy"] < 0.2
    single = results["per-batch"]["single_pair_accuracy"]
    assert single["max"] < results["per-batch"]["test_accuracy"] + 0.1
    assert single["median"] < 0.8


def test_the_default_is_both_one_after_the_other_and_both_are_resumed(source, tmp_path):
    path = tmp_path / "run"
    result = invoke("--data", source, "--epochs", 2, "--batch-size", 8, "--out", path, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["arms"] == found["experiments"]["all"]["arms"]
    assert tuple(found["experiments"]["gamma-beta"]["arms"]) == ARMS
    again = invoke("--resume", path, "--json")
    assert json.loads(again.stdout)["experiments"] == found["experiments"]
    assert again.stderr.count("finished already") == 2


def test_the_words_say_what_learned(source, tmp_path):
    result = invoke(
        "--data", source, "--experiment", "gamma-beta", "--epochs", 2, "--batch-size", 8, "--out", tmp_path / "run"
    )
    assert result.exit_code == 0, result.output
    assert "every other weight kept its random value, and these 1,200 numbers alone got" in result.stdout
    assert not (tmp_path / "run" / "gamma-beta").exists()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--experiment", "weights"], "--experiment: expected one of all, gamma-beta, paper, got 'weights'"),
        (["--experiment", "gamma-beta", "--arms", "learned,none"], "no arm none with gamma-beta"),
    ],
)
def test_wrong_settings_are_one_line(arguments, line, source):
    result = invoke("--data", source, *arguments)
    assert result.exit_code == 2
    assert line in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_an_older_run_is_resumed_as_what_it_was(source):
    meta = Settings(data=source).to_meta()
    del meta["experiment"]
    assert Settings.from_meta(meta).experiment == "all"
    with pytest.raises(LabError, match="no arm none with gamma-beta"):
        Settings("gamma-beta", data=source, arms=("none",))
