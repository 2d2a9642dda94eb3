"""Checkpoints of odd tensors: a line, exit status 2, and no more memory than the file's size allows."""

import os
import resource
import subprocess
import sys
import zipfile

import pytest
import torch
from odd_checkpoints import odd_values, whole_state
from torch import nn
from typer.testing import CliRunner

import batchnorm as bn
from batchnorm.cli import app
from batchnorm.diagnosis.checkpoint import read_checkpoint

ODD = odd_values()
MEMORY = 3 << 30  # of address space, of which torch's libraries take about 1 GB


def invoke(*arguments):
    said = CliRunner().invoke(app, list(map(str, arguments)))
    assert said.exception is None or isinstance(said.exception, SystemExit), said.exc_info
    return said


def save(path, **changes):
    torch.save({**whole_state(), **changes}, path)
    return path


@pytest.mark.parametrize("kind", ["sparse", "quantized", "meta", "complex", "expanded far"])
@pytest.mark.parametrize("key", ["weight", "running_var"])
def test_what_holds_no_plain_numbers_is_named(tmp_path, kind, key):
    path = save(tmp_path / "a.pt", **{f"1.{key}": ODD[kind]})
    for command, status in (("diagnose", 2), ("summary", 1)):
        said = invoke(command, path)
        assert said.exit_code == status
        assert said.stderr.count("\n") == 1
        assert str(path) in said.stderr
        assert kind == "expanded far" or f"1.{key} must hold one real number per channel" in said.stderr


@pytest.mark.parametrize("kind", ["scalar", "inf", "complex scalar", "meta scalar", "negative", "sparse", "text"])
def test_a_counter_that_counts_nothing_is_not_believed(tmp_path, kind):
    path = save(tmp_path / "a.pt", **{"1.num_batches_tracked": ODD[kind]})
    assert read_checkpoint(path)[0].updates is None
    assert invoke("diagnose", path).exit_code in (0, 1)


def test_a_dict_within_itself_is_read_once(tmp_path):
    path = save(tmp_path / "a.pt", cycle=ODD["cycle"])
    assert [layer.name for layer in read_checkpoint(path)] == ["1", "3"]
    state = whole_state()
    within = {"model": state, "again": {"model": state}}
    assert [layer.name for layer in read_checkpoint(save(tmp_path / "b.pt", **within))] == ["1", "3"]


def compressed(path):
    """The checkpoint with every storage deflated, and one more of 2 GiB of zeros."""
    save(path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
        with archive.open(next(iter(members)).split("/")[0] + "/data/99", "w", force_zip64=True) as file:
            for _ in range(2048):
                file.write(bytes(1 << 20))


def repeated(path):
    vectors = dict.fromkeys(("1.weight", "1.bias", "1.running_mean", "1.running_var"), torch.zeros(1).expand(2**28))
    save(path, **vectors)


def repeated_often(path):
    """Each vector is small enough, and all of them are not."""
    state = {f"{i}.running_var": torch.zeros(1).expand(2**20) for i in range(200)}
    save(path, **state)


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("write", [compressed, repeated, repeated_often], ids=lambda write: write.__name__)
def test_memory_is_bounded_by_the_file(tmp_path, write):
    path = tmp_path / "a.pt"
    write(path)

    def limit():
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))

    command = [sys.executable, "-m", "batchnorm", "diagnose", str(path)]
    said = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit, check=False)
    assert said.returncode == 2, said.stderr
    assert said.stderr.count("\n") == 1
    assert str(path) in said.stderr
    assert "BATCHNORM_READ_LIMIT" in said.stderr or "one number" in said.stderr


def test_the_limit_can_be_raised(tmp_path, monkeypatch):
    path = save(tmp_path / "a.pt")
    monkeypatch.setenv("BATCHNORM_READ_LIMIT", "100")
    with pytest.raises(
        ValueError, match=r"192 bytes or more, beyond the limit of 100; if you trust .* raise BATCHNORM"
    ):
        read_checkpoint(path)
    monkeypatch.setenv("BATCHNORM_READ_LIMIT", "192")
    assert len(read_checkpoint(path)) == 2
    monkeypatch.setenv("BATCHNORM_READ_LIMIT", "1GB")
    assert "must be a number of bytes, got '1GB'" in invoke("diagnose", path).stderr


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_a_fifo_is_not_opened(tmp_path, name):
    os.mkfifo(tmp_path / name)
    said = invoke("diagnose", tmp_path / name)
    assert said.exit_code == 2
    assert "must be a regular file" in said.stderr


def test_no_mistake_of_ours_has_the_status_of_a_finding(tmp_path, monkeypatch):
    path = save(tmp_path / "a.pt")

    def fail(*_):
        raise ZeroDivisionError("ours")

    monkeypatch.setattr("batchnorm.diagnosis.judge.judge", fail)
    said = invoke("diagnose", path)
    assert said.exit_code == 2
    assert said.stderr == f"batchnorm: {path} could not be judged: ZeroDivisionError: ours\n"


@pytest.mark.processes
def test_a_reader_that_went_away_changes_no_status(tmp_path):
    state = nn.Sequential(*(nn.BatchNorm1d(3) for _ in range(20))).state_dict()
    torch.save({**state, "1.running_var": torch.full((3,), torch.nan)}, tmp_path / "bad.pt")
    torch.save(state, tmp_path / "good.pt")
    assert not bn.diagnose(tmp_path / "good.pt").serious
    for name, status in (("bad.pt", 1), ("good.pt", 0)):
        read, write = os.pipe()
        os.close(read)
        command = [sys.executable, "-u", "-m", "batchnorm", "diagnose", str(tmp_path / name)]
        said = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, check=False)
        os.close(write)
        assert said.returncode == status, said.stderr
