"""The callbacks in transformers' own Trainer."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

import batchnorm as bn
from batchnorm.integrations.transformers import Freeze, Recalibrate, Watch

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # transformers' own


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
        self.seen = []

    def forward(self, x, labels):
        if self.training and torch.is_grad_enabled():
            self.seen.append(self.net[0](x).mean(0).detach().numpy())
        logits = self.net(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def data(n=40):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 4, generator=generator) * 2 + 3
    return [{"x": x[k], "labels": k % 2} for k in range(n)]


def train(folder, model, *callbacks, resume=None, **options):
    options = {
        "num_train_epochs": 2, "per_device_train_batch_size": 8, "save_strategy": "no", "learning_rate": 0.1,
        "logging_steps": 2, "report_to": [], "use_cpu": True, "disable_tqdm": True, **options,
    }  # fmt: skip
    arguments = TrainingArguments(output_dir=str(folder), **options)
    trainer = Trainer(model, arguments, train_dataset=data(), eval_dataset=data(), callbacks=list(callbacks))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_recorded_step_by_step(tmp_path):
    model = Net()
    train(tmp_path, model, Watch(tmp_path / "run"))
    run = bn.open_run(tmp_path / "run")
    assert (run.status, run.steps.tolist(), set(run.counts("net.1"))) == ("finished", list(range(10)), {8})
    np.testing.assert_allclose(run.vectors("net.1", "batch_mean")[1], model.seen, atol=1e-6)
    assert np.abs(run.vectors("net.1", "gamma_grad")[1]).max(1).min() > 0
    assert any("loss" in row for row in run.scalars())


def test_accumulated_batches_are_one_step(tmp_path):
    model = Net()
    train(tmp_path, model, Watch(tmp_path / "run"), gradient_accumulation_steps=5)
    run = bn.open_run(tmp_path / "run")
    assert run.steps.tolist() == [0, 1]
    assert set(run.counts("net.1")) == {40}
    np.testing.assert_allclose(
        run.vectors("net.1", "batch_mean")[1], np.reshape(model.seen, (2, 5, 3)).mean(1), atol=1e-6
    )


def test_going_on_from_a_checkpoint_goes_on_with_the_run(tmp_path):
    train(tmp_path, Net(), Watch(tmp_path / "run"), save_strategy="steps", save_steps=5)
    train(tmp_path, Net(), Watch(tmp_path / "run"), resume=str(tmp_path / "checkpoint-5"), num_train_epochs=3)
    run = bn.open_run(tmp_path / "run")
    assert run.steps.tolist() == list(range(15))
    assert (run.status, run.damage) == ("finished", [])


def test_an_exception_leaves_an_interrupted_run(tmp_path):
    class Fails(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise ZeroDivisionError

    watch = Watch(tmp_path / "run")
    with pytest.raises(ZeroDivisionError):
        train(tmp_path, Net(), watch, Fails())
    watch.recorder.close("interrupted")  # as the end of the process does
    run = bn.open_run(tmp_path / "run")
    assert (run.status, run.steps.tolist()) == ("interrupted", [0, 1, 2])


def test_frozen_through_the_trainers_train_and_eval(tmp_path):
    model = Net()
    before = copy.deepcopy(model.net[1].state_dict())
    train(tmp_path, model, Freeze(affine=True), eval_strategy="epoch")
    assert all(torch.equal(model.net[1].state_dict()[name], value) for name, value in before.items())
    assert not torch.equal(model.net[0].weight, Net().net[0].weight)


def test_the_training_is_the_same_watched_and_recalibrated(tmp_path):
    found = []
    for callbacks in ([], [Watch(tmp_path / "run"), Recalibrate()]):
        model = Net()
        train(tmp_path, model, *callbacks, eval_strategy="steps", eval_steps=3)
        found.append(dict(model.named_parameters()))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def is_exact(model):
    """Whether the running statistics are those of all the data, at the weights as they are."""
    with torch.no_grad():
        x = model.net[0](torch.stack([each["x"] for each in data()])).double()
    torch.testing.assert_close(model.net[1].running_mean.double(), x.mean(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.net[1].running_var.double(), x.var(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_evaluations_checkpoints_and_the_end_have_the_datas_statistics(tmp_path, strategy):
    class Checks(TrainerCallback):
        checked = 0

        def on_evaluate(self, args, state, control, model, **kwargs):
            is_exact(model)
            Checks.checked += 1

    model = Net()
    train(
        tmp_path, model, Recalibrate(batches=None), Checks(),
        eval_strategy=strategy, eval_steps=3, save_strategy=strategy, save_steps=4,
    )  # fmt: skip
    assert Checks.checked >= 2
    is_exact(model)
    saved = list(tmp_path.glob("checkpoint-*"))
    assert len(saved) >= 2
    for folder in saved:
        from safetensors.torch import load_file

        loaded = Net()
        loaded.load_state_dict(load_file(folder / "model.safetensors"))
        is_exact(loaded)
