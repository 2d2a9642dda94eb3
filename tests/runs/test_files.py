"""What a run or its page writes is made exclusively, and never lands in a file that a link leads to."""

import os
import sys

import pytest
import torch

import batchnorm as bn
from batchnorm.runs import files
from batchnorm.runs.files import write_atomically
from batchnorm.runs.lock import Lock, is_held
from batchnorm.runs.schema import ALERTS, HISTOGRAMS, OPTIMIZERS, PROBES, RUN, SCALARS, STATS, UPDATES, VECTORS

APPENDED = [STATS, VECTORS, PROBES, HISTOGRAMS, UPDATES, SCALARS, ALERTS, OPTIMIZERS]
LINKS = [os.symlink, os.link]
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows lets not everybody make links")


@pytest.fixture
def mine(tmp_path):
    """A file of the user's, outside of the run."""
    path = tmp_path / "mine.txt"
    path.write_text("mine")
    yield path
    assert path.read_text() == "mine"


@pytest.fixture
def model():
    return torch.nn.BatchNorm1d(3)


@pytest.fixture
def run(tmp_path, model):
    with bn.watch(model, tmp_path / "run") as w:
        model(torch.randn(8, 3))
        w.log(loss=1.0)
    return w.path


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("name", APPENDED)
def test_a_resumed_run_is_not_written_through_a_link(run, model, mine, link, name):
    before = (run / RUN).read_bytes()
    (run / name).unlink()
    link(mine, run / name)
    with pytest.raises(FileExistsError, match=rf"{name} must be a regular file with one name, but is a link"):
        bn.watch(model, run, resume_step=0)
    assert (run / RUN).read_bytes() == before
    assert is_held(run) is False


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
@pytest.mark.parametrize("name", APPENDED)
def test_a_folder_or_a_pipe_in_a_files_place(run, model, make, name):
    (run / name).unlink()
    make(run / name)
    with pytest.raises(FileExistsError, match=rf"{name} must be a regular file with one name, but is something else"):
        bn.watch(model, run, resume_step=0)


@pytest.mark.parametrize("link", LINKS)
def test_the_lock_is_not_written_through_a_link(run, model, mine, link):
    (run / ".lock").unlink()
    link(mine, run / ".lock")
    with pytest.raises(FileExistsError, match="must be a regular file with one name"):
        bn.watch(model, run, resume_step=0)


def test_a_pipe_for_a_lock_keeps_nobody_waiting(tmp_path):
    os.mkfifo(tmp_path / ".lock")
    is_held(tmp_path)
    with pytest.raises(FileExistsError, match="must be a regular file with one name"):
        Lock(tmp_path)


@pytest.mark.parametrize("name", [*APPENDED, RUN])
@pytest.mark.parametrize("target", ["mine.txt", "missing.txt"])
def test_a_new_run_takes_no_file_that_is_there(tmp_path, model, mine, name, target):
    folder = tmp_path / "new"
    folder.mkdir()
    os.symlink(tmp_path / target, folder / name)
    with pytest.raises(FileExistsError, match="holds a"):
        bn.watch(model, folder)
    assert [path.name for path in folder.iterdir() if path.name != ".lock"] == [name]
    assert not (tmp_path / "missing.txt").exists()


@pytest.mark.parametrize("name", ["report.html", RUN])
def test_names_that_can_be_foreseen_lead_nowhere(run, mine, name):
    for planted in (f".{name}.{os.getpid()}", name):
        (run / planted).unlink(missing_ok=True)
        os.symlink(mine, run / planted)
    write_atomically(run / name, b"new")
    assert not (run / name).is_symlink()
    assert (run / name).read_bytes() == b"new"


def test_a_name_that_was_foreseen_all_the_same_is_not_opened(run, mine, monkeypatch):
    monkeypatch.setattr(files.secrets, "token_hex", lambda size: "0")
    os.symlink(mine, run / ".report.html.0")
    with pytest.raises(FileExistsError):
        write_atomically(run / "report.html", b"new")
    assert (run / ".report.html.0").is_symlink()  # not ours to remove
    assert not (run / "report.html").exists()


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    with pytest.raises(IsADirectoryError):
        write_atomically(tmp_path / "a", b"new")
    monkeypatch.setattr(files.os, "fsync", lambda file: os.stat(tmp_path / "missing"))
    with pytest.raises(FileNotFoundError):
        write_atomically(tmp_path / "b", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_what_is_made_has_the_mode_that_the_user_asked_for(tmp_path):
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "a", b"")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640
