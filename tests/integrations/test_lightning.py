"""The callbacks in Lightning's own Trainer."""

import copy

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.callbacks.weight_averaging import EMAWeightAveraging
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import batchnorm as bn
from batchnorm.integrations.lightning import Freeze, Recalibrate, Watch

# The warnings are Lightning's own, about workers, loggers and deprecations.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


class Module(pl.LightningModule):
    """training_step calls the net, not the module, as most do."""

    def __init__(self, optimizers=1, manual=False):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
        self.automatic_optimization = not manual
        self.seen = []
        self._optimizers = optimizers

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, index):
        x, y = batch
        self.seen.append(self.net[0](x).mean(0).detach().numpy())
        loss = nn.functional.cross_entropy(self.net(x), y)
        self.log("loss", loss)
        if not self.automatic_optimization:
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()
        return loss

    def validation_step(self, batch, index):
        x, y = batch
        self.log("val", nn.functional.cross_entropy(self.net(x), y))

    def configure_optimizers(self):
        if self._optimizers == 1:
            return torch.optim.SGD(self.parameters(), 0.1)
        return [torch.optim.SGD(part.parameters(), 0.1) for part in (self.net[0], self.net[1:])]


def data(n=40):
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(n, 4, generator=generator) * 2 + 3, torch.randint(2, (n,), generator=generator))


def loader(batch=8, **options):
    return DataLoader(data(), batch, **options)


def fit(module, folder, *callbacks, checkpoint=None, validates=True, **options):
    options = {"max_epochs": 2, "logger": False, "enable_checkpointing": False, **options}
    trainer = pl.Trainer(
        default_root_dir=folder, accelerator="cpu", callbacks=list(callbacks), enable_progress_bar=False,
        enable_model_summary=False, log_every_n_steps=1, **options,
    )  # fmt: skip
    trainer.fit(module, loader(), loader() if validates else None, ckpt_path=checkpoint)
    return trainer


def test_automatic_optimization_is_recorded_step_by_step(tmp_path):
    module = Module()
    fit(module, tmp_path, Watch(tmp_path / "run"))
    run = bn.open_run(tmp_path / "run")
    assert (run.status, run.steps.tolist(), set(run.counts("net.1"))) == ("finished", list(range(10)), {8})
    np.testing.assert_allclose(run.vectors("net.1", "batch_mean")[1], module.seen, atol=1e-6)
    assert np.abs(run.vectors("net.1", "gamma_grad")[1]).max(1).min() > 0
    gamma = run.vectors("net.1", "gamma")[1]
    np.testing.assert_allclose(gamma[1:], gamma[:-1] - 0.1 * run.vectors("net.1", "gamma_grad")[1][:-1], atol=1e-6)


@pytest.mark.parametrize("ours", [False, True])
def test_accumulated_batches_are_one_step(tmp_path, ours):
    module = Module()
    if ours:
        bn.convert(module)
    fit(module, tmp_path, Watch(tmp_path / "run"), accumulate_grad_batches=5)
    run = bn.open_run(tmp_path / "run")
    assert run.steps.tolist() == [0, 1]
    assert set(run.forwards("net.1")) == {5}
    assert set(run.counts("net.1")) == {40}
    np.testing.assert_allclose(
        run.vectors("net.1", "batch_mean")[1], np.reshape(module.seen, (2, 5, 3)).mean(1), atol=1e-6
    )


def test_several_optimizers(tmp_path):
    module = Module(optimizers=2, manual=True)
    fit(module, tmp_path, Watch(tmp_path / "run"))
    run = bn.open_run(tmp_path / "run")
    assert run.steps.tolist() == list(range(10))
    np.testing.assert_allclose(run.vectors("net.1", "batch_mean")[1], module.seen, atol=1e-6)


def test_the_training_is_the_same_watched_and_recalibrated(tmp_path):
    found = []
    for callbacks in ([], [Watch(tmp_path / "run"), Recalibrate()]):
        module = Module()
        torch.manual_seed(1)
        trainer = pl.Trainer(
            accelerator="cpu", callbacks=callbacks, max_epochs=3, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, val_check_interval=3,
        )  # fmt: skip
        trainer.fit(module, loader(shuffle=True), loader())
        found.append(dict(module.named_parameters()))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize(("error", "status"), [(ZeroDivisionError, "failed"), (KeyboardInterrupt, "interrupted")])
def test_an_exception_ends_the_run(tmp_path, error, status):
    class Fails(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, index):
            if index == 2:
                raise error

    with pytest.raises((error, SystemExit)):  # Lightning exits after a Ctrl-C
        fit(Module(), tmp_path, Watch(tmp_path / "run"), Fails())
    run = bn.open_run(tmp_path / "run")
    assert (run.status, run.steps.tolist()) == (status, [0, 1, 2])


def test_going_on_from_a_checkpoint_goes_on_with_the_run(tmp_path):
    first = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=5, save_top_k=-1)
    fit(Module(), tmp_path, Watch(tmp_path / "run"), first, enable_checkpointing=True)
    (saved,) = (tmp_path / "saved").glob("*step=5.ckpt")
    fit(Module(), tmp_path, Watch(tmp_path / "run"), checkpoint=saved, max_epochs=3)
    run = bn.open_run(tmp_path / "run")
    assert run.steps.tolist() == list(range(15))
    assert run.damage == []


def test_records_go_to_the_trainers_loggers(tmp_path):
    from lightning.pytorch.loggers import CSVLogger

    logger = CSVLogger(tmp_path / "csv")
    fit(Module(), tmp_path, Watch(tmp_path / "run", log=True), logger=logger)
    logger.save()
    text = next((tmp_path / "csv").rglob("metrics.csv")).read_text().splitlines()
    assert "bn/net.1/gamma_mean" in text[0]


def test_frozen_through_the_trainers_train_and_eval(tmp_path):
    module = Module()
    before = copy.deepcopy(module.net[1].state_dict())
    fit(module, tmp_path, Freeze(affine=True, part=lambda module: module.net))
    assert all(torch.equal(module.net[1].state_dict()[name], value) for name, value in before.items())
    assert not torch.equal(module.net[0].weight, Module().net[0].weight)


def exact(module):
    """What the batch norm is given over all the data, at the weights as they are."""
    with torch.no_grad():
        x = module.net[0](data().tensors[0]).double()
    return x.mean(0), x.var(0)


def is_exact(state, module, prefix="net.1."):
    mean, variance = exact(module)
    torch.testing.assert_close(state[prefix + "running_mean"].double(), mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state[prefix + "running_var"].double(), variance, rtol=1e-5, atol=1e-5)


def test_validation_checkpoints_and_the_end_have_the_datas_statistics(tmp_path):
    class Checks(pl.Callback):
        checked = 0

        def on_validation_batch_start(self, trainer, module, *rest):
            if not trainer.sanity_checking:
                is_exact(module.state_dict(), module)
                Checks.checked += 1

    module = Module()
    saves = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=3, save_top_k=-1)
    fit(module, tmp_path, Recalibrate(batches=None), Checks(), saves, enable_checkpointing=True)
    assert Checks.checked == 10
    is_exact(module.state_dict(), module)
    saved = list((tmp_path / "saved").glob("*.ckpt"))
    assert len(saved) == 3
    for path in saved:
        loaded = Module()
        loaded.load_state_dict(torch.load(path, weights_only=False)["state_dict"])
        is_exact(loaded.state_dict(), loaded)


@pytest.mark.parametrize("average", ["ema", "swa"])
def test_averaged_weights_have_the_datas_statistics(tmp_path, average):
    callback = EMAWeightAveraging(decay=0.7) if average == "ema" else StochasticWeightAveraging(0.05, 1)
    module = Module()
    saves = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=4, save_top_k=-1)
    trainer = fit(module, tmp_path, callback, Recalibrate(batches=None), saves, enable_checkpointing=True, max_epochs=4)
    is_exact(module.state_dict(), module)
    trainer.save_checkpoint(tmp_path / "saved" / "end.ckpt")
    for path in (tmp_path / "saved").glob("*.ckpt"):
        loaded = Module()
        loaded.load_state_dict(torch.load(path, weights_only=False)["state_dict"])
        is_exact(loaded.state_dict(), loaded)


def test_it_has_to_come_after_what_averages(tmp_path):
    with pytest.raises(ValueError, match="Recalibrate must come after EMAWeightAveraging in callbacks"):
        fit(Module(), tmp_path, Recalibrate(), EMAWeightAveraging())
