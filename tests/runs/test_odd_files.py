"""Runs whose files are not what they should be: one line of damage, the rest is read, and nothing waits or grows."""

import json
import os
import time
import tracemalloc

import numpy as np
import pytest
from synthetic import layer, sgd_steps, story, write_run
from typer.testing import CliRunner

from batchnorm.cli import app
from batchnorm.runs import list_runs, open_run
from batchnorm.runs.explain import explain
from batchnorm.runs.journal import frame
from batchnorm.runs.schema import (
    ALERTS,
    HISTOGRAMS,
    MOST_LAYERS,
    OPTIMIZERS,
    PROBES,
    RUN,
    SCALARS,
    STATS,
    UPDATES,
    VECTORS,
)

INFO = layer("bn", 3)


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "runs" / "odd", [INFO], [story(INFO, 5)])


def invoke(*arguments):
    said = CliRunner().invoke(app, list(map(str, arguments)))
    assert said.exception is None or isinstance(said.exception, SystemExit), said.exc_info
    return said


def to_folder(path):
    path.unlink(missing_ok=True)
    path.mkdir()


def to_fifo(path):
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def to_device(path):
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize(
    "name", [STATS, VECTORS, PROBES, HISTOGRAMS, UPDATES, SCALARS, ALERTS, OPTIMIZERS, "results.json"]
)
@pytest.mark.parametrize("become", [to_folder, to_fifo, to_device], ids=lambda become: become.__name__)
def test_only_regular_files_are_opened(run, name, become):
    become(run / name)
    opened = open_run(run)
    assert len(opened.damage) == 1
    assert f"{name} must be a regular file" in opened.damage[0]
    assert len(opened.steps) == (0 if name == STATS else 5)
    assert invoke("show", run).exit_code == 0


@pytest.mark.parametrize("become", [to_folder, to_fifo, to_device], ids=lambda become: become.__name__)
def test_neither_is_run_json_nor_the_lock(run, become):
    facts = json.loads((run / RUN).read_text())
    (run / RUN).write_text(json.dumps({**facts, "status": "running"}))
    become(run / ".lock")
    assert open_run(run).status == "running"  # nobody can know
    become(run / RUN)
    with pytest.raises(ValueError, match=r"run\.json must be a regular file"):
        open_run(run)


ODD_FACTS = {
    "deep": {"meta": json.loads("[" * 900 + "]" * 900)},
    "deep in meta": {"meta": {"x": json.loads("[" * 40 + "]" * 40)}},
    "eps of 400 digits": {"layers": [{**INFO.to_json(), "eps": 10**400}]},
    "eps that is not a number": {"layers": [{**INFO.to_json(), "eps": float("nan")}]},
    "eps of infinity": {"layers": [{**INFO.to_json(), "eps": float("inf")}]},
    "channels of 400 digits": {"layers": [{**INFO.to_json(), "channels": 10**400}]},
    "more channels than a record holds": {"layers": [{**INFO.to_json(), "channels": 10**9}]},
    "more channels together": {"layers": [{**INFO.to_json(), "channels": 4 * 10**7}] * 2},
    "too many layers": {"layers": [INFO.to_json()] * (MOST_LAYERS + 1)},
    "arms that are none": {"arms": {"learned": 1}},
    "a name with a line after it": {"arms": ["a\n"]},
    "recorded that is none": {"recorded": [1]},
}


@pytest.mark.parametrize("facts", ODD_FACTS.values(), ids=list(ODD_FACTS))
def test_one_broken_run_is_a_line_and_the_others_are_listed(run, facts):
    whole = write_run(run.parent / "whole", [INFO], [story(INFO, 5)])
    before = json.loads((run / RUN).read_text())
    (run / RUN).write_text(json.dumps({**before, **facts}))
    refused = []
    assert [each.path for each in list_runs(run.parent, refused)] == [whole]
    assert len(refused) == 1
    assert refused[0].startswith(f"{run / RUN} does not describe a run: ")
    said = invoke("list", run.parent)
    assert said.exit_code == 0
    assert "whole" in said.stdout
    assert said.stderr.count("\n") == 1
    assert invoke("show", run).exit_code == 1
    assert invoke("diagnose", run).exit_code == 2


@pytest.mark.parametrize("text", ["[" * 5000, "[" * 10**6, '{"a":' * 5000, "9" * 5000, '{"format": NaN}'])
def test_hostile_json(run, text):
    for name in (RUN, "results.json"):
        (run / name).write_text(text)
    with pytest.raises(ValueError, match="does not describe a run"):
        open_run(run)
    assert list_runs(run.parent) == []


ODD_RESULTS = (3, [], {"arms": []}, {"arms": {"learned": 3}}, {"arms": {"learned": {"test_accuracy": "high"}}})


@pytest.mark.parametrize("results", ODD_RESULTS, ids=str)
def test_results_of_other_types(tmp_path, results):
    path = write_run(tmp_path / "run", arms=["learned"], results=results)
    write_run(path / "learned", [INFO], [story(INFO, 5)])
    run = open_run(path)
    assert run.results == {}
    assert [line.split(":")[0] for line in run.damage] == ["results.json"]
    for command in ("show", "report"):
        assert invoke(command, path).exit_code == 0


@pytest.mark.parametrize(
    "meta", [{"test_samples": "many", "arms": 3, "batch_size": []}, {"arms": [[], {}, None]}], ids=str
)
def test_meta_may_hold_anything(tmp_path, meta):
    path = write_run(tmp_path / "run", arms=["a", "b"], meta=meta, results={"arms": {"a": {"test_accuracy": 0.5}}})
    for arm in ("a", "b"):
        write_run(path / arm, [INFO], [story(INFO, 5)])
    for command in ("show", "report", "diagnose"):
        assert "batchnorm:" not in invoke(command, path).output, command


def test_an_arm_that_cannot_be_read_is_damage(tmp_path):
    path = write_run(tmp_path / "run", arms=["a", "b"])
    for arm in ("a", "b"):
        write_run(path / arm, [INFO], [story(INFO, 5)])
    (path / "a" / RUN).write_text("{")
    run = open_run(path)
    assert list(run.arms) == ["b"]
    assert len(run.damage) == 1
    assert run.damage[0].startswith("arm a: ")


def test_right_checksums_of_missing_numbers(run):
    """A median without the percentiles around it, which no recorder writes."""
    data = bytearray((run / STATS).read_bytes())
    record = np.frombuffer(data[20 : len(data) // 5], np.uint8).copy()
    stats = record[-8 * 9 * 4 :].view("<f4").reshape(8, 9)
    stats[:, 1] = np.nan
    (run / STATS).write_bytes(frame(0, record.tobytes()))
    for command in ("show", "report", "diagnose"):
        assert "batchnorm:" not in invoke(command, run).output, command


@pytest.mark.slow
def test_a_table_of_probes_is_no_larger_than_they_are(run):
    """5 MB of probes of one batch, and one of 100,000 batches: padded they would be 50 GB."""
    size = 2 * INFO.channels * 4
    small, large = frame(1, bytes(size)), frame(1, bytes(100_000 * size))
    (run / PROBES).write_bytes(small * 60_000 + large)
    opened = open_run(run)
    tracemalloc.start()
    steps, values = opened.probes("bn", "batch_mean")
    assert tracemalloc.get_traced_memory()[1] < 1 << 28
    tracemalloc.stop()
    assert len(steps) == len(values) == 60_000
    assert "kept the 60000 whole frames" in opened.damage[0]


def test_a_table_of_histograms_is_no_larger_than_16_times_what_is_stored(run):
    """20 MB of probes of one batch, and one of 8: the padded table would take 640 MB."""
    size = 32 * INFO.channels
    (run / HISTOGRAMS).write_bytes(frame(1, bytes(size)) * 200_000 + frame(1, bytes(8 * size)))
    opened = open_run(run)
    tracemalloc.start()
    steps, _, shares = opened.histograms("bn")
    assert tracemalloc.get_traced_memory()[1] < 1 << 28
    tracemalloc.stop()
    assert shares.shape == (len(steps), 1, 3, 32)
    assert "histograms-0001.bin: " in opened.damage[0]
    assert "kept the 200000 whole frames" in opened.damage[0]


@pytest.mark.parametrize("length", [0, 1, 95, 9 * 96, 10 * 96])
def test_histograms_of_an_impossible_length(run, length):
    (run / HISTOGRAMS).write_bytes(frame(1, bytes(96)) + frame(2, bytes(length)))
    opened = open_run(run)
    assert opened.histograms("bn")[2].shape == (1, 1, 3, 32)
    assert f"impossible length ({length} bytes)" in opened.damage[0]


@pytest.mark.slow
def test_channels_of_which_nothing_was_recorded_take_no_memory(run):
    facts = json.loads((run / RUN).read_text())
    facts["layers"][0]["channels"] = 60_000_000
    (run / RUN).write_text(json.dumps(facts))
    tracemalloc.start()
    assert invoke("report", run).exit_code == 0
    assert tracemalloc.get_traced_memory()[1] < 1 << 28
    tracemalloc.stop()


def test_integers_of_any_size_are_scalars(run, tmp_path):
    lines = [{"step": 0, "loss": 2**70}, {"step": 1, "loss": 10**400}, {"step": 2**63, "loss": 1}]
    (run / SCALARS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    opened = open_run(run)
    assert opened.scalars() == lines[:2]
    assert opened.damage == ["scalars.jsonl: garbage in line 3; kept the 2 lines before it"]
    assert invoke("export", run, "--out", tmp_path / "events", "--format", "tensorboard").exit_code == 0
    said = invoke("export", run, "--out", tmp_path / "tables")
    assert said.exit_code == 1
    assert "scalars make no table" in said.stderr


def spoiled_lines(run, change):
    lines = [change(json.loads(line)) for line in (run / OPTIMIZERS).read_text().splitlines()]
    (run / OPTIMIZERS).write_text("".join(json.dumps(line) + "\n" for line in lines))


ODD_OPTIONS = [{"lr": "fast"}, {"lr": 10**400}, {"optimizer": 3}, {"state": None}, {"steps": "nan"}, {"skipped": 1}]


@pytest.mark.parametrize("odd", ODD_OPTIONS, ids=lambda odd: next(iter(odd)))
def test_options_of_other_types(tmp_path, odd):
    values = [story(INFO, 5)]
    path = write_run(tmp_path / "run", [INFO], values, updates=sgd_steps(values, [0, 1, 4]))
    assert [update.step for update in open_run(path).updates("bn")] == [0, 1, 4]
    spoiled_lines(path, lambda line: {**line, **(odd if line["step"] == 4 else {})})
    run = open_run(path)
    assert [update.step for update in run.updates("bn")] == [0, 1]
    assert [line.split(":")[0] for line in run.damage] == [OPTIMIZERS]


EXTREMES = [0, -1, 1e308, 5e-324, True, float("inf"), float("nan")]


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_options_of_any_value_are_computed_with(tmp_path, name):
    values = [story(INFO, 5)]
    path = write_run(tmp_path / "run", [INFO], values, updates=sgd_steps(values, [3]))
    said = ["lr", "momentum", "dampening", "nesterov", "weight_decay", "beta1", "beta2", "eps", "amsgrad", "maximize"]
    facts = {"optimizer": name, "state": "momentum_buffer exp_avg_sq a b c d e", "steps": -2.5}
    for extreme in EXTREMES:
        odd = {key: str(extreme) if isinstance(extreme, float) and extreme - extreme else extreme for key in said}
        spoiled_lines(path, lambda line, odd=odd: {**line, **odd, **facts})
        run = open_run(path)
        assert run.damage == []
        assert isinstance(explain(run.updates("bn")[0], 2, "beta").predicted, float)


def test_updates_without_their_lines_and_frames_of_another_size(tmp_path):
    values = [story(INFO, 5)]
    path = write_run(tmp_path / "run", [INFO], values, updates=sgd_steps(values, [0, 1, 4]))
    lines = (path / OPTIMIZERS).read_text().splitlines(keepends=True)
    (path / OPTIMIZERS).write_text("".join(lines[:2]))
    run = open_run(path)
    assert [update.step for update in run.updates("bn")] == [0, 1]
    assert run.damage == [f"{UPDATES}: {OPTIMIZERS} lacks lines of step 4; their updates are left out"]
    with open(path / UPDATES, "ab") as file:
        file.write(frame(5, b"1234"))
    assert "frame of an impossible length (4 bytes)" in open_run(path).damage[0]


def test_worked_steps_of_many_channels_take_no_memory(run):
    facts = json.loads((run / RUN).read_text())
    facts["layers"][0]["channels"] = 60_000_000
    (run / RUN).write_text(json.dumps(facts))
    tracemalloc.start()
    assert open_run(run).updates("bn") == []
    assert tracemalloc.get_traced_memory()[1] < 1 << 24
    tracemalloc.stop()


def test_probes_of_negative_variances(tmp_path):
    values = np.full((3, 2, 3), -1.0, np.float32)
    path = write_run(tmp_path / "run", [INFO], [story(INFO, 5)], probes={2: values})
    assert invoke("report", path).exit_code == 0


@pytest.mark.slow
def test_a_run_of_many_layers_is_shown_in_seconds(tmp_path):
    """Not in the square of their number; the terminal has room for the first."""
    infos = [layer(f"layer{i}", 1) for i in range(5000)]
    path = write_run(tmp_path / "run", infos, [story(infos[0], 2)] * len(infos))
    started = time.perf_counter()
    said = invoke("show", path)
    assert time.perf_counter() - started < 20
    assert "and 4,000 more layers: --json names all" in said.stdout
