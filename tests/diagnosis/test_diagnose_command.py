"""batchnorm diagnose: exit status, --json, files that are refused, and no torch where a run is read."""

import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from synthetic import layer, story, write_run
from torch import nn
from typer.testing import CliRunner

import batchnorm as bn
from batchnorm.cli import app


def invoke(*arguments):
    return CliRunner().invoke(app, ["diagnose", *map(str, arguments)])


def model(broken):
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    for _ in range(60):
        net(torch.randn(16, 4))
    if broken:
        net[1].running_var[1] = float("nan")
    return net


@pytest.mark.parametrize("wrap", [lambda state: state, lambda state: {"epoch": 3, "model": state}])
@pytest.mark.parametrize("broken", [False, True])
def test_exit_status_of_a_checkpoint(tmp_path, broken, wrap):
    path = tmp_path / "checkpoint.pt"
    torch.save(wrap(model(broken).state_dict()), path)
    said = invoke(path)
    assert said.exit_code == int(broken), said.output
    assert ("serious: nonfinite in 1" in said.output) == broken


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_safetensors(tmp_path, dtype):
    path = tmp_path / "model.safetensors"
    save_file(model(True).to(dtype).state_dict(), path)
    assert invoke(path).exit_code == 1
    save_file(model(False).state_dict(), path)
    assert invoke(path).exit_code == 0


def test_json(tmp_path):
    path = tmp_path / "checkpoint.pt"
    torch.save(model(True).state_dict(), path)
    said = invoke(path, "--json")
    assert said.exit_code == 1
    facts = json.loads(said.stdout)
    assert (facts["serious"], facts["warning"], facts["note"]) == (1, 0, 0)
    (found,) = facts["findings"]
    assert found == bn.diagnose(path)[0].to_dict()


def test_several_checkpoints_are_compared(tmp_path):
    paths = [tmp_path / "rank0.pt", tmp_path / "rank1.pt"]
    net = model(False)
    torch.save(net.state_dict(), paths[0])
    torch.save(net.state_dict(), paths[1])
    assert invoke(*paths).exit_code == 0
    net[1].running_mean += 3
    torch.save(net.state_dict(), paths[1])
    said = invoke(*paths)
    assert said.exit_code == 1
    assert "ranks-disagree" in said.output


def runs(folder):
    """Three recorded trainings of a layer of the same name: healthy, poisoned for a while, and without a step."""
    info = layer()
    poisoned = story(info, 60, seed=1)
    poisoned["batch_mean"][30:33, 1] = np.nan
    write_run(folder / "mine", [info], [story(info, 60)])
    write_run(folder / "nan", [info], [poisoned])
    write_run(folder / "empty", [info], [story(info, 0)])


def test_several_runs_are_judged_one_by_one(tmp_path):
    runs(tmp_path)
    mine, poisoned, empty = (tmp_path / name for name in ("mine", "nan", "empty"))
    assert invoke(mine).exit_code == 0
    for paths in ((mine, poisoned), (poisoned, mine), (poisoned,), (empty, poisoned)):
        said = invoke(*paths)
        assert said.exit_code == 1, said.output
        assert "serious: nonfinite" in said.output
    both = bn.diagnose([mine, poisoned])
    assert both.serious[0].sources == (str(poisoned),)
    assert both.serious[0].since_step == 30
    assert f"in bn of {poisoned}, since step 30" in " ".join(invoke(mine, poisoned).output.split())  # however it wraps
    # Two trainings are no replicas: that they differ is no fault.
    assert invoke(mine, mine).exit_code == 0
    write_run(tmp_path / "other", [layer()], [story(layer(), 60, seed=5)])
    assert invoke(mine, tmp_path / "other").exit_code == 0


def test_an_empty_run_is_not_passed(tmp_path):
    runs(tmp_path)
    for paths in ((tmp_path / "empty",), (tmp_path / "mine", tmp_path / "empty")):
        said = invoke(*paths)
        assert said.exit_code == 2
        assert "Not judged" in said.output
        assert "0 recorded steps" in said.output
    assert json.loads(invoke(tmp_path / "empty", "--json").stdout)["judged"]["nothing"] is True


def test_layers_of_other_sizes_are_no_copies(tmp_path):
    one, other = model(False), nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5))
    for name, net in (("one", one), ("other", other)):
        torch.save(net.state_dict(), tmp_path / f"{name}.pt")
    said = invoke(tmp_path / "one.pt", tmp_path / "other.pt")
    assert said.exit_code == 0
    assert "its number of channels differs" in said.output


class Trap:
    def __reduce__(self):
        return (open, (Trap.path, "w"))


def test_no_code_in_a_file_is_run(tmp_path):
    Trap.path = str(tmp_path / "ran")
    path = tmp_path / "evil.pt"
    torch.save({"state": model(False).state_dict(), "trap": Trap()}, path)
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Trap()))
    for bad in (path, tmp_path / "plain.pt"):
        said = invoke(bad)
        assert said.exit_code == 2
        assert len(said.stderr.splitlines()) == 1
    assert "save only the weights" in invoke(path).stderr
    assert not (tmp_path / "ran").exists()


def test_what_cannot_be_read_is_status_2(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "noise.pt").write_bytes(b"no checkpoint")
    (tmp_path / "noise.safetensors").write_bytes(b"no checkpoint")
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "linear.pt")
    names = ("missing.pt", "missing.safetensors", "empty", "noise.pt", "noise.safetensors", "linear.pt")
    for name in names:
        said = invoke(tmp_path / name)
        assert said.exit_code == 2, name
        assert said.stdout == ""
        assert said.stderr.startswith("batchnorm: ")
    assert invoke().exit_code == 2
    assert invoke(tmp_path / "linear.pt", "--unknown").exit_code == 2


@pytest.mark.processes
def test_a_run_is_diagnosed_without_torch(tmp_path):
    info = layer()
    values = story(info, 60)
    values["running_var"][40:, 2] = np.nan
    path = write_run(tmp_path / "run", [info], [values])
    code = (
        "import sys, batchnorm.cli as cli\n"
        "try: cli.app(['diagnose', sys.argv[1], '--json'])\n"
        "except SystemExit as end: status = end.code\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
        "sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    found = json.loads(done.stdout)["findings"][0]
    assert (found["rule"], found["since_step"]) == ("nonfinite", 40)


def test_names_are_text(tmp_path):
    path = tmp_path / "checkpoint.pt"
    state = {f"\x1b[31m[bold]evil.{key}": value for key, value in model(True)[1].state_dict().items()}
    torch.save(state, path)
    said = invoke(path)
    assert "\x1b[31m" not in said.output
    assert "[bold]evil" in said.output
