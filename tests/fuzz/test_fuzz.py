"""Spoiled files of every kind, from a seed: no traceback, no hang, a line that names the file, and the exit status.

BATCHNORM_FUZZ_SECONDS is how long each kind may take (`make fuzz`: an hour for all); BATCHNORM_FUZZ_SEED is where it
begins. A failure prints the seed of its case: BATCHNORM_FUZZ_SEED=that runs it first.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from mutation import mutate_bytes, mutate_run
from odd_checkpoints import mutate_state
from odd_data import WRITERS
from synthetic import bells, layer, probe_values, sgd_steps, story, write_run
from typer.testing import CliRunner

from batchnorm.cli import app

pytestmark = pytest.mark.slow

SECONDS = float(os.environ.get("BATCHNORM_FUZZ_SECONDS", 12))
SEED = int(os.environ.get("BATCHNORM_FUZZ_SEED", 0))
HANGS = 30  # seconds after which a command on a file of some kilobytes is said to hang


def cases() -> Iterator[int]:
    """The seeds of the cases, until the time is over."""
    end = time.monotonic() + SECONDS
    seed = SEED
    while time.monotonic() < end:
        yield seed
        seed += 1


@contextmanager
def not_hanging() -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(HANGS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def check(seed: int, *arguments: object) -> Any:
    """Run a command, which must end with a status that it promises and, where it fails, one line."""
    words = list(map(str, arguments))
    with not_hanging():
        said = CliRunner().invoke(app, words)
    about = f"BATCHNORM_FUZZ_SEED={seed}: batchnorm {' '.join(words)}\n{said.output[-2000:]}"
    if said.exception is not None and not isinstance(said.exception, SystemExit):
        raise AssertionError(about) from said.exception
    assert said.exit_code in (0, 1, 2), about
    failed = said.exit_code and "judged" not in said.output.lower() and not said.output.startswith("{")
    if failed:
        assert said.output.count("\n") == 1, about
        assert said.output.startswith("batchnorm: "), about
    if words[0] == "diagnose" and said.exit_code == 1:
        assert "serious" in said.output, about
        assert not failed, about
    return said


@pytest.fixture(scope="module")
def whole_runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A watched training and an experiment."""
    root = tmp_path_factory.mktemp("whole")
    infos = [layer("a", 3), layer("b", 2, momentum=None)]
    values = [story(info, 12, i) for i, info in enumerate(infos)]
    alert = {"step": 3, "layer": "a", "quantity": "gamma", "what": "nonfinite", "count": 1}
    plain = write_run(
        root / "plain",
        infos,
        values,
        probes=probe_values([3, 9], 3, 5),
        histograms=bells(infos, [3, 9]),
        updates=sgd_steps(values, [0, 1, 8]),
        alerts=[alert],
        meta={"lr": 0.1},
    )
    (plain / "scalars.jsonl").write_text('{"step":0,"loss":1.5}\n{"step":1,"loss":"nan","more":2}\n')
    singles = {"min": 0.4, "median": 0.5, "max": 0.6, "all": [0.4, 0.5, 0.6]}
    result = {"test_accuracy": 0.9, "train_accuracy": 1.0, "train_loss": 0.1, "steps": 12, "seconds": 1.5}
    result["curve"] = {"step": [4, 8], "test_accuracy": [0.5, 0.9]}
    results = {"learned": result, "per-batch": {**result, "single_pair_accuracy": singles}}
    results["per-batch"]["pair_spread"] = {"gamma_std": 0.1, "beta_std": None}
    meta = {"test_samples": 100, "batch_size": 60, "arms": ["learned", "per-batch"]}
    experiment = write_run(root / "experiment", arms=list(results), results={"arms": results}, meta=meta)
    for arm in results:
        write_run(experiment / arm, infos, values)
    return [plain, experiment]


def test_runs(whole_runs: list[Path], tmp_path: Path) -> None:
    for seed in cases():
        draw = Random(seed)
        run = mutate_run(draw, draw.choice(whole_runs), tmp_path / "runs" / "run")
        check(seed, "list", tmp_path / "runs", *draw.choice(((), ("--json",))))
        check(seed, "show", run, *draw.choice(((), ("--json",))))
        check(seed, "diagnose", run)
        if draw.random() < 0.15:
            check(seed, "report", run, "--out", tmp_path / "page.html")
        if draw.random() < 0.2:
            kind = draw.choice(("csv", "parquet", "tensorboard"))
            shutil.rmtree(tmp_path / "out", ignore_errors=True)
            check(seed, "export", run, "--out", tmp_path / "out", "--format", kind)


def test_checkpoints(tmp_path: Path) -> None:
    for seed in cases():
        draw = Random(seed)
        path = mutate_state(draw, tmp_path)
        if draw.random() < 0.6:
            path.write_bytes(mutate_bytes(draw, path.read_bytes()))
        check(seed, "diagnose", path)
        check(seed, "summary", path)


def test_data(tmp_path: Path) -> None:
    from batchnorm.lab.data import load
    from batchnorm.lab.errors import LabError

    for seed in cases():
        draw = Random(seed)
        folder = tmp_path / "data"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        path = draw.choice(WRITERS)(draw, folder)
        spoiled = draw.choice(sorted(folder.iterdir()))
        spoiled.write_bytes(mutate_bytes(draw, spoiled.read_bytes()))
        try:
            with not_hanging():
                data = load(str(path))
        except LabError as error:
            message = str(error)
            assert str(folder) in message, f"BATCHNORM_FUZZ_SEED={seed}: {message}"
            assert "\n" not in message, f"BATCHNORM_FUZZ_SEED={seed}: {message}"
        except Exception as error:
            raise AssertionError(f"BATCHNORM_FUZZ_SEED={seed}: {path}") from error
        else:
            assert np.isfinite(data.x_train.numpy()).all(), f"BATCHNORM_FUZZ_SEED={seed}"
