"""Exports, read back with the programs they are for, against the run itself."""

import csv
import json
import subprocess
import sys

import numpy as np
import pyarrow.ipc
import pyarrow.parquet
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import batchnorm as bn
from batchnorm.runs import COLUMNS
from batchnorm.runs.export import export

TABLES = ("alerts", "histograms", "probes", "scalars", "stats", "updates", "vectors")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "run"
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(3, affine=False), nn.BatchNorm1d(3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with bn.watch(model, folder, optimizer=optimizer, every=2) as w:
        for k in range(6):
            optimizer.zero_grad()
            model(torch.randn(8, 3)).square().sum().backward()
            optimizer.step()
            w.log(loss=float(k), **({"accuracy": 0.5} if k == 5 else {}))
        with torch.no_grad():
            model[1].weight[0] = float("nan")
        model(torch.randn(8, 3))
        optimizer.step()
        w.probe([torch.randn(8, 3), torch.randn(8, 3)])
    return bn.open_run(folder)


def read(path):
    if path.suffix == ".parquet":
        return pyarrow.parquet.read_table(path).to_pylist()
    if path.suffix == ".arrow":
        with pyarrow.ipc.open_file(str(path)) as file:
            return file.read_all().to_pylist()
    with open(path, newline="") as file:
        return [
            {k: v if k in ("layer", "quantity", "what", "optimizer") else _number(v) for k, v in row.items()}
            for row in csv.DictReader(file)
        ]


def _number(text):
    return None if text == "" else float(text)


@pytest.mark.parametrize("format", ["parquet", "arrow", "csv"])
def test_tables(run, tmp_path, format):
    out = export(run, tmp_path / "out", format)
    stats, vectors, probes, scalars, alerts = (
        read(out / f"{name}.{format}") for name in ("stats", "vectors", "probes", "scalars", "alerts")
    )
    assert {(row["layer"], row["quantity"]) for row in stats if row["layer"] == "0"} == {
        ("0", name) for name in ("batch_mean", "batch_var", "running_mean", "running_var")
    }
    for layer, quantity in (("0", "batch_var"), ("1", "gamma")):
        rows = [row for row in stats if (row["layer"], row["quantity"]) == (layer, quantity)]
        assert [row["step"] for row in rows] == [0, 2, 4, 6]
        found = [[row[name] for name in COLUMNS] for row in rows]
        np.testing.assert_allclose(found, run.stats(layer, quantity), rtol=1e-6)
        assert {(row["count"], row["forwards"]) for row in rows} == {(8, 1)}
        rows = [row for row in vectors if (row["layer"], row["quantity"]) == (layer, quantity)]
        assert [(row["step"], row["channel"]) for row in rows] == [(s, c) for s in (0, 2, 4, 6) for c in range(3)]
        found = np.array([row["value"] for row in rows], float).reshape(4, 3)
        np.testing.assert_allclose(found, run.vectors(layer, quantity)[1], rtol=1e-6)
    rows = [row for row in probes if (row["layer"], row["quantity"]) == ("1", "batch_mean")]
    assert [(row["probe"], row["batch"], row["channel"]) for row in rows] == [
        (0, b, c) for b in (0, 1) for c in range(3)
    ]
    np.testing.assert_allclose(
        [row["value"] for row in rows], run.probes("1", "batch_mean")[1].ravel(), rtol=1e-6, atol=1e-12
    )
    histograms, updates = (read(out / f"{name}.{format}") for name in ("histograms", "updates"))
    rows = [row["share"] for row in histograms if row["layer"] == "1" and row["channel"] == 1]
    np.testing.assert_allclose(rows, run.histograms("1")[2][0, :, 1].ravel(), rtol=1e-6)
    assert [row["low"] for row in histograms[:3]] == [-4, -3.75, -3.5]
    assert {row["layer"] for row in updates} == {"1"}
    rows = [row for row in updates if (row["quantity"], row["channel"]) == ("beta", 2)]
    assert [(row["step"], row["optimizer"], row["lr"]) for row in rows] == [(s, "SGD", 0.1) for s in (0, 2, 4, 6)]
    for row, update in zip(rows, run.updates("1"), strict=True):
        assert row["after"] == pytest.approx(float(update.beta.after[2]))
        assert row["before"] - row["lr"] * row["gradient"] == pytest.approx(row["after"], abs=1e-6)
        assert row["momentum_buffer"] is None or np.isnan(row["momentum_buffer"])
    assert [(row["step"], row["loss"], row["accuracy"]) for row in scalars][-2:] == [(4, 4, None), (5, 5, 0.5)]
    assert [(row["step"], row["quantity"], row["count"]) for row in alerts] == [(6, "gamma", 1)]


def test_tensorboard(run, tmp_path):
    out = export(run, tmp_path / "out", "tensorboard")
    events = EventAccumulator(str(out), size_guidance={"scalars": 0, "histograms": 0})
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(k, k) for k in range(6)]
    means = [(e.step, e.value) for e in events.Scalars("bn/1/gamma")]
    np.testing.assert_allclose(means, np.stack([run.steps, run.stats("1", "gamma")[:, 7]], 1), rtol=1e-6)
    last = events.Histograms("bn/1/gamma/channels")[-1]
    gamma = run.vectors("1", "gamma")[1][-1]
    assert (last.step, last.histogram_value.num) == (6, 2)  # of the finite ones
    assert last.histogram_value.sum == pytest.approx(np.nansum(gamma.astype(float)))
    assert sum(last.histogram_value.bucket) == 2
    assert "bn/0/gamma" not in events.Tags()["scalars"]


def test_an_experiment_has_a_folder_an_arm(run, tmp_path):
    (tmp_path / "run.json").write_text('{"format": 1, "arms": ["learned", "none"]}')
    (tmp_path / "learned").symlink_to(run.path)
    out = export(bn.open_run(tmp_path), tmp_path / "out", "csv")
    assert sorted(path.relative_to(out).as_posix() for path in out.rglob("*")) == [
        "learned", *(f"learned/{name}.csv" for name in TABLES)
    ]  # fmt: skip


def test_refusals_leave_nothing(run, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="parquet, arrow, csv, tensorboard"):
        export(run, tmp_path / "out", "xml")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="empty folder"):
        export(run, tmp_path / "full", "csv")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ModuleNotFoundError, match=r"batchnorm\[export\]"):
        export(run, tmp_path / "out", "csv")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
    assert (tmp_path / "full" / "file").read_text() == "mine"


@pytest.mark.processes
@pytest.mark.parametrize("format", ["csv", "tensorboard"])
def test_without_torch(run, tmp_path, format):
    program = (
        "import sys\nfrom batchnorm.runs import open_run\nfrom batchnorm.runs.export import export\n"
        f"export(open_run({str(run.path)!r}), {str(tmp_path / 'out')!r}, {format!r})\nsys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.processes
def test_the_command(run, tmp_path):
    command = [sys.executable, "-m", "batchnorm", "export", str(run.path), "--out", str(tmp_path / "out")]
    done = subprocess.run([*command, "--format", "csv", "--json"], check=True, capture_output=True, text=True)
    assert json.loads(done.stdout) == {"export": str(tmp_path / "out")}
    assert (tmp_path / "out" / "stats.csv").is_file()
    failed = subprocess.run(command, capture_output=True, text=True)
    assert failed.returncode == 1
    assert failed.stderr.startswith("batchnorm: ")
    assert failed.stderr.count("\n") == 1
