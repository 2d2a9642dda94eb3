"""Reading runs: without torch, with clear errors, and never led astray by what a file says."""

import json
import subprocess
import sys

import numpy as np
import pytest

from batchnorm.runs import LayerInfo, list_runs, open_run
from batchnorm.runs import folder as _folder
from batchnorm.runs.folder import end_folder
from batchnorm.runs.journal import Journal
from batchnorm.runs.schema import ALERTS, PROBES, QUANTITIES, SCALARS, STATS, VECTORS, stats_dtype

LAYERS = [LayerInfo("net.a", "BatchNorm1d", 2, 1e-5, 0.1, True, True), LayerInfo("b", "X", 3, 1e-3, None, False, True)]


def create_folder(*arguments):
    """A new run's folder that nobody is writing to any more."""
    lock = _folder.create_folder(*arguments)
    lock.release()
    return lock.path


@pytest.fixture
def folder(tmp_path):
    """A run written by hand, every number different."""
    path = create_folder(tmp_path / "run", LAYERS, {"data": "digits"}, {})
    with Journal(path / STATS) as stats, Journal(path / VECTORS) as vectors, Journal(path / PROBES) as probes:
        for step in (0, 2, 5):
            record = np.zeros((), stats_dtype(LAYERS))
            record["count"] = [step * 10, step * 10 + 1]
            record["forwards"] = [1, step]
            record["stats"] = np.arange(2 * 8 * 9).reshape(2, 8, 9) + step * 1000
            stats.append([(step, record.tobytes())])
        for step in (0, 5):
            vectors.append([(step, (np.arange(8 * 5, dtype="<f4") + step * 1000).tobytes())])
        probes.append([(5, np.arange(2 * 10, dtype="<f4").tobytes()), (5, np.arange(3 * 10, dtype="<f4").tobytes())])
    (path / SCALARS).write_text('{"step":0,"loss":0.5}\n{"step":2,"loss":"nan"}\n')
    (path / ALERTS).write_text('{"step":2,"layer":"b","quantity":"beta","what":"nonfinite","count":1}\n')
    end_folder(path, "finished", {})
    return path


def test_every_number_from_its_place(folder):
    run = open_run(folder)
    assert (run.status, run.meta, run.layers, run.damage) == ("finished", {"data": "digits"}, LAYERS, [])
    assert run.steps.tolist() == [0, 2, 5]
    for i, layer in enumerate(("net.a", "b")):
        assert run.counts(layer).tolist() == [i, 20 + i, 50 + i]
        assert run.counts(layer).dtype == np.int64
        for q, quantity in enumerate(QUANTITIES):
            expected = [np.arange(9) + 72 * i + 9 * q + 1000 * step for step in (0, 2, 5)]
            np.testing.assert_array_equal(run.stats(layer, quantity), expected)
            assert run.stats(layer, quantity).dtype == np.float32
            steps, values = run.vectors(layer, quantity)
            start, channels = (q * 2, 2) if i == 0 else (16 + q * 3, 3)
            np.testing.assert_array_equal(values, [np.arange(start, start + channels) + 1000 * s for s in (0, 5)])
            assert steps.tolist() == [0, 5]
    assert run.forwards("b").tolist() == [0, 2, 5]
    assert run.forwards("b").dtype == np.int32
    steps, values = run.probes("b", "batch_var")
    assert steps.tolist() == [5, 5]
    np.testing.assert_array_equal(values[0], [[7, 8, 9], [17, 18, 19], [np.nan] * 3])
    np.testing.assert_array_equal(values[1, 2], [27, 28, 29])
    assert run.scalars()[0] == {"step": 0, "loss": 0.5}
    assert np.isnan(run.scalars()[1]["loss"])
    assert run.alerts()[0]["count"] == 1
    assert run.main is run
    assert (run.arms, run.results) == ({}, {})


def test_a_run_with_nothing_in_it_yet(tmp_path):
    run = open_run(create_folder(tmp_path / "run", LAYERS, None, {}))
    assert run.steps.shape == (0,)
    assert run.stats("b", "gamma").shape == (0, 9)
    assert run.counts("b").shape == run.forwards("b").shape == (0,)
    assert run.vectors("b", "gamma")[1].shape == (0, 3)
    assert run.probes("b", "batch_mean")[1].shape == (0, 0, 3)
    assert (run.scalars(), run.alerts(), run.damage, run.status) == ([], [], [], "interrupted")


def test_unknown_names(folder):
    run = open_run(folder)
    with pytest.raises(KeyError, match=r"no layer 'c'.*net\.a, b"):
        run.stats("c", "gamma")
    with pytest.raises(KeyError, match=r"no quantity 'delta'.*gamma"):
        run.vectors("b", "delta")
    with pytest.raises(KeyError, match="batch_mean, batch_var"):
        run.probes("b", "gamma")


def test_damage_names_each_file_and_what_was_kept(folder):
    for name in (STATS, VECTORS, PROBES, SCALARS, ALERTS):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[:-1])
    run = open_run(folder)
    assert [line.split(":")[0] for line in run.damage] == [STATS, VECTORS, PROBES, SCALARS, ALERTS]
    assert "kept the 2 whole frames" in run.damage[0]
    assert run.steps.tolist() == [0, 2]
    assert len(run.scalars()) == 1


@pytest.mark.parametrize(
    "line", [b"[]\n", b"{}\n", b'{"step": "x"}\n', b"\xff\xfe\n", b"nonsense\n", b'{"step":1}{"step":2}\n', b"\n"]
)
def test_garbage_lines(folder, line):
    (folder / SCALARS).write_bytes(b'{"step":0,"loss":1}\n' + line + b'{"step":1,"loss":1}\n')
    run = open_run(folder)
    assert run.scalars() == [{"step": 0, "loss": 1}]
    assert run.damage == ["scalars.jsonl: garbage in line 2; kept the 1 lines before it"]


@pytest.mark.parametrize(
    "facts",
    [
        "nonsense",
        [],
        {},
        {"format": 2},
        {"format": "1"},
        {"format": 1, "layers": [{"name": "a"}]},
        {"format": 1, "layers": [{**LAYERS[0].to_json(), "channels": 0}]},
        {"format": 1, "layers": [{**LAYERS[0].to_json(), "channels": "many"}]},
        {"format": 1, "layers": 3},
        {"format": 1, "meta": 3},
        {"format": 1, "arms": ["learned", "../../etc"]},
        {"format": 1, "arms": [".."]},
        {"format": 1, "arms": ["a/b"]},
        {"format": 1, "arms": [3]},
    ],
)
def test_not_a_run(tmp_path, facts):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "run.json").write_text(facts if isinstance(facts, str) else json.dumps(facts))
    with pytest.raises(ValueError, match=r"run\.json does not describe a run"):
        open_run(tmp_path / "bad")
    assert list_runs(tmp_path) == []


def test_no_run_there(tmp_path):
    for path in (tmp_path, tmp_path / "none", tmp_path / "file" / "x"):
        (tmp_path / "file").write_text("")
        with pytest.raises(FileNotFoundError, match=r"not a run: it has no run\.json"):
            open_run(path)
    assert list_runs(tmp_path / "none") == []


def test_list_is_newest_first(tmp_path):
    for day, name in ((1, "z"), (3, "a"), (2, "m")):
        path = create_folder(tmp_path / name, LAYERS, None, {})
        facts = json.loads((path / "run.json").read_text())
        (path / "run.json").write_text(json.dumps({**facts, "created": f"2026-01-0{day}T00:00:00+00:00"}))
    (tmp_path / "stray").mkdir()
    assert [run.path.name for run in list_runs(tmp_path)] == ["a", "m", "z"]


def test_an_experiment(tmp_path):
    create_folder(tmp_path, [], {"data": "digits"}, {"arms": ["none", "fixed", "learned", "later"]})
    for arm in ("none", "fixed"):
        create_folder(tmp_path / arm, LAYERS if arm != "none" else [], None, {})
    run = open_run(tmp_path)
    assert list(run.arms) == ["none", "fixed"]
    assert run.main.path.name == "fixed"
    create_folder(tmp_path / "learned", LAYERS, None, {})
    assert open_run(tmp_path).main.path.name == "learned"
    assert run.results == {}
    (tmp_path / "results.json").write_text('{"arms": {}}')
    assert open_run(tmp_path).results == {"arms": {}}
    (tmp_path / "results.json").write_text("torn {")
    assert open_run(tmp_path).results == {}


@pytest.mark.processes
def test_reading_does_not_import_torch(folder):
    program = (
        "import sys, batchnorm\n"
        f"run = batchnorm.open_run({str(folder)!r})\n"
        "from batchnorm.runs import list_runs\n"
        "run.stats('b', 'gamma'), run.vectors('b', 'gamma'), run.probes('b', 'batch_var')\n"
        "run.scalars(), run.alerts(), run.damage, list_runs('.')\n"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
