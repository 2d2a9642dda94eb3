"""In the arm per-batch a user's data, of every kind, is cut into fixed batches, each with a pair of its own."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch

from batchnorm.lab import Experiment, Settings, load
from batchnorm.lab.training import CHECKPOINT, Training

BATCH, EPOCHS = 8, 3


def npz(folder, x, y):
    np.savez(folder / "mine.npz", x=x, y=y)
    return folder / "mine.npz"


def npz_with_test(folder, x, y):
    np.savez(folder / "mine.npz", x_train=x, y_train=y, x_test=x[:6] + 1, y_test=y[:6])
    return folder / "mine.npz"


def csv(folder, x, y):
    table = np.column_stack([x.reshape(len(x), -1)[:, :5], y])
    np.savetxt(folder / "mine.csv", table, "%g", ",", header="a,b,c,d,e,label", comments="")
    return folder / "mine.csv"


def idx(folder, x, y):
    x, y = x.astype(np.uint8), y.astype(np.uint8)
    for part, some in (("train", slice(None)), ("t10k", slice(6))):
        for kind, values in (("images-idx3", x[some, 0]), ("labels-idx1", y[some])):
            head = struct.pack(f">4B{values.ndim}I", 0, 0, 8, values.ndim, *values.shape)
            (folder / f"{part}-{kind}-ubyte").write_bytes(head + values.tobytes())
    return folder


def cifar(folder, x, y):
    rng = np.random.default_rng(1)
    records = np.column_stack([y, rng.integers(0, 256, (len(y), 3072))]).astype(np.uint8)
    for number, some in enumerate(np.array_split(records, 2), 1):
        (folder / f"data_batch_{number}.bin").write_bytes(some.tobytes())
    (folder / "test_batch.bin").write_bytes(records[:6].tobytes())
    return folder


@pytest.mark.parametrize("write", [npz, npz_with_test, csv, idx, cifar])
def test_each_batch_keeps_its_samples_and_owns_a_pair(write, tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    (tmp_path / "data").mkdir()
    source = write(tmp_path / "data", rng.integers(0, 256, (45, 1, 4, 4)).astype(float), np.arange(45) % 3)
    data = load(str(source))
    steps = []
    take = Training._train_step

    def noted(self, recorder, epoch, batch, samples):
        owned = [pairs[batch].detach().clone() for pairs in self.pairs.gamma]
        taken = take(self, recorder, epoch, batch, samples)
        moved = [not torch.equal(pairs[batch], before) for pairs, before in zip(self.pairs.gamma, owned, strict=True)]
        steps.append((epoch, batch, tuple(samples.tolist()), all(moved)))
        return taken

    monkeypatch.setattr(Training, "_train_step", noted)
    settings = Settings(data=str(source), epochs=EPOCHS, batch_size=BATCH, arms=("per-batch",))
    run = Experiment.begin(settings, tmp_path / "run").run()
    whole = sorted(range(len(data.y_train)))
    for epoch in range(1, EPOCHS + 1):  # every epoch has every sample once
        assert sorted(sample for at, _, samples, _ in steps if at == epoch for sample in samples) == whole
    owners = {(batch, samples) for _, batch, samples, _ in steps}
    assert len(owners) == len(steps) / EPOCHS  # the same samples in each epoch
    assert all(moved for *_, moved in steps)
    tensors = torch.load(run.path / "per-batch" / CHECKPOINT, weights_only=True)["tensors"]
    pairs = [value for name, value in tensors.items() if name.startswith("pairs.gamma.0.")]
    assert len(pairs) == len(owners)
    assert len({tuple(pair.tolist()) for pair in pairs}) == len(owners)
    assert len(run.results["arms"]["per-batch"]["single_pair_accuracy"]["all"]) == len(owners)
