"""A damaged or a crafted checkpoint is refused in one line, and the run stays as it was."""

import copy
import io
import os
import random
import shutil
import zipfile

import pytest
import torch
from typer.testing import CliRunner

import batchnorm as bn
from batchnorm.cli import app
from batchnorm.lab import Experiment, LabError, Settings, Training, load
from batchnorm.lab.checkpoint import pack, unpack
from batchnorm.lab.training import CHECKPOINT

SAVED = 6  # in the second epoch of 4 steps each


def stop(tick):
    if tick.step == SAVED + 1:  # a step is saved after it was shown
        raise KeyboardInterrupt


@pytest.fixture(scope="module")
def stopped(source, tmp_path_factory):
    """Experiments of one arm that were interrupted, by arm and optimizer."""
    made = {}

    def interrupted(arm="learned", optimizer="adam"):
        if (arm, optimizer) not in made:
            path = tmp_path_factory.mktemp("runs") / arm
            settings = Settings(data=source, epochs=3, batch_size=8, arms=(arm,), optimizer=optimizer)
            with pytest.raises(KeyboardInterrupt):
                Experiment.begin(settings, path).run(stop, 0.0)
            made[arm, optimizer] = path
        return made[arm, optimizer]

    return interrupted


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_it_is_a_file_of_torch_save(stopped):
    data = (stopped() / "learned" / CHECKPOINT).read_bytes()
    state = torch.load(io.BytesIO(data), weights_only=True)
    assert state["step"] == SAVED
    assert zipfile.ZipFile(io.BytesIO(data)).testzip() is None


def test_every_flipped_bit_and_every_cut_is_refused(stopped):
    data = bytearray((stopped() / "learned" / CHECKPOINT).read_bytes())
    rng = random.Random(0)
    for at in [*rng.sample(range(len(data)), 200), *range(len(data) - 100, len(data))]:
        bit = 1 << rng.randrange(8)
        data[at] ^= bit
        with pytest.raises(ValueError, match="its checksum is wrong"):
            unpack(bytes(data))
        data[at] ^= bit
        with pytest.raises(ValueError, match="its checksum is wrong"):
            unpack(bytes(data[:at]))
    assert unpack(bytes(data))["step"] == SAVED


def test_what_is_no_archive_of_its_own_size_is_refused():
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(1 << 20))
    for data in (b"", b"x" * 500, bomb.getvalue()):
        sealed = _sealed(data)
        with pytest.raises(ValueError, match=r"not a zip file|more than its size"):
            unpack(sealed)
    for state in (torch.nn.Linear(1, 1), {"a": stop}):
        with pytest.raises(ValueError, match="Weights only load failed"):
            unpack(pack(state))


def _sealed(data):
    """A checksum after what torch did not write."""
    from batchnorm.lab import checkpoint

    content = data[:-2] + checkpoint._SEAL_BYTES.to_bytes(2, "little")
    return content + checkpoint._seal(content)


def put(place, value):
    """Change what is at a place: to the value, or to what it makes of that."""

    def change(state):
        *way, last = place
        for key in way:
            state = state[key]
        state[last] = value(state[last]) if callable(value) else value

    return change


def without(*place):
    def change(state):
        *way, last = place
        for key in way:
            state = state[key]
        del state[last]

    return change


def cyclic(state):
    state["tensors"]["model.output.weight"] = state


def key_of(number):
    """Of the weight of the last layer, in the optimizer."""
    return ("optimizer", "state", 0, number)


WEIGHT = ("tensors", "model.output.weight")
CRAFTED = {
    "step-huge": put(["step"], 10**9),
    "step-negative": put(["step"], -5),
    "step-zero": put(["step"], 0),
    "step-one-more": put(["step"], SAVED + 1),
    "step-float": put(["step"], 6.0),
    "step-tensor": put(["step"], torch.tensor([6, 6])),
    "step-bool": put(["step"], True),
    "epoch": put(["epoch"], 2),
    "epoch-tensor": put(["epoch"], torch.ones(2)),
    "seconds-nan": put(["seconds"], float("nan")),
    "seconds-negative": put(["seconds"], -1.0),
    "seconds-text": put(["seconds"], "1"),
    "losses-none": put(["losses"], None),
    "losses-too-many": put(["losses"], [1.0] * 3),
    "losses-texts": put(["losses"], ["a", "b"]),
    "curve-list": put(["curve"], []),
    "curve-no-step": without("curve", "step"),
    "curve-other-step": put(["curve", "step"], [5]),
    "curve-tensor-step": put(["curve", "step"], [torch.ones(2)]),
    "curve-no-loss": put(["curve", "loss"], []),
    "generator-short": put(["generator"], torch.zeros(3, dtype=torch.uint8)),
    "generator-zeros": put(["generator"], torch.zeros_like),
    "generator-ones": put(["generator"], lambda t: torch.full_like(t, 255)),
    "generator-text": put(["generator"], "a"),
    "tensors-missing": without(*WEIGHT),
    "tensors-list": put(["tensors"], []),
    "tensors-more": put(["tensors", "model.x"], torch.ones(1)),
    "tensors-cyclic": cyclic,
    "tensors-shape": put(WEIGHT, torch.ones(2, 2)),
    "tensors-dtype": put(WEIGHT, lambda t: t.double()),
    "tensors-sparse": put(WEIGHT, lambda t: t.to_sparse()),
    "tensors-meta": put(WEIGHT, lambda t: t.to("meta")),
    "tensors-number": put(WEIGHT, 1.0),
    "optimizer-none": put(["optimizer"], None),
    "optimizer-no-state": without("optimizer", "state"),
    "optimizer-one-missing": without("optimizer", "state", 0),
    "optimizer-one-more": put(["optimizer", "state", 99], {}),
    "optimizer-shape": put(key_of("exp_avg"), torch.ones(1)),
    "optimizer-no-moment": without(*key_of("exp_avg")),
    "optimizer-step": put(key_of("step"), torch.tensor(-1.0)),
    "optimizer-step-nan": put(key_of("step"), torch.tensor(float("nan"))),
    "no-step": without("step"),
    "a-list": None,
}


@pytest.mark.parametrize("name", CRAFTED)
def test_a_crafted_checkpoint_is_refused_and_the_run_stays_as_it_was(stopped, tmp_path, name):
    shutil.copytree(stopped(), tmp_path / "run")
    path = tmp_path / "run" / "learned" / CHECKPOINT
    state = unpack(path.read_bytes())
    if CRAFTED[name] is None:
        state = list(state)
    else:
        CRAFTED[name](state)
    path.write_bytes(pack(state))
    before = contents(tmp_path / "run")
    done = CliRunner().invoke(app, ["train", "--resume", str(tmp_path / "run")])
    line = done.stderr.strip().splitlines()[-1]
    assert isinstance(done.exception, SystemExit)
    assert done.exit_code == 2
    assert line.startswith(f"batchnorm: {path}: damaged (")
    assert line.endswith("); delete it to train this arm from the start")
    assert contents(tmp_path / "run") == before
    assert bn.open_run(tmp_path / "run").status == "interrupted"


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("arm", ["learned", "per-batch"])
def test_how_tensors_lie_in_a_file_and_its_options_do_not_matter(stopped, tmp_path, arm, optimizer):
    found = []
    for crafted in (False, True):
        run = tmp_path / str(crafted)
        shutil.copytree(stopped(arm, optimizer), run)
        if crafted:
            path = run / arm / CHECKPOINT
            state = unpack(path.read_bytes())
            state["tensors"] = {k: v.t().contiguous().t() if v.ndim == 2 else v for k, v in state["tensors"].items()}
            for of_one in state["optimizer"]["state"].values():
                for name, tensor in of_one.items():
                    of_one[name] = tensor.t().contiguous().t() if tensor.ndim == 2 else tensor
            for group in state["optimizer"]["param_groups"]:
                group.update(copy.deepcopy({"lr": 9.0, "weight_decay": 9.0, "maximize": True}))
            path.write_bytes(pack(state))
        found.append(Experiment.resume(run).run().results["arms"][arm]["weights_sha256"])
    assert found[0] == found[1]


def test_stride_0_moments_are_laid_out(stopped, tmp_path):
    shutil.copytree(stopped(), tmp_path / "run")
    path = tmp_path / "run" / "learned" / CHECKPOINT
    state = unpack(path.read_bytes())
    for of_one in state["optimizer"]["state"].values():
        of_one["exp_avg"] = torch.zeros(1).expand(of_one["exp_avg"].shape)
    path.write_bytes(pack(state))
    assert Experiment.resume(tmp_path / "run").run().status == "finished"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="a system without links and pipes for all")
def test_nothing_is_read_or_written_through_a_link(stopped, tmp_path):
    run, mine = tmp_path / "run", tmp_path / "mine"
    shutil.copytree(stopped(), run)
    shutil.move(run / "learned", mine)
    (run / "learned").symlink_to(mine)
    before = contents(mine)
    with pytest.raises(LabError, match="must be a regular folder, but is a link"):
        Experiment.resume(run).run()
    assert contents(mine) == before
    (run / "learned").unlink()
    shutil.copytree(mine, run / "learned")
    for make in (lambda path: path.symlink_to(mine / CHECKPOINT), os.mkfifo, os.mkdir):
        path = run / "learned" / CHECKPOINT
        path.unlink()  # the folder is the last
        make(path)
        with pytest.raises(LabError, match="must be a regular file with one name"):
            Experiment.resume(run).run()
    assert contents(mine) == before


def test_a_training_alone_takes_up_its_checkpoint(stopped, tmp_path):
    shutil.copytree(stopped() / "learned", tmp_path / "run")
    settings = Settings.from_meta({**bn.open_run(stopped()).meta})
    training = Training("learned", load(settings.data), settings, tmp_path / "run")
    assert training.step == SAVED
