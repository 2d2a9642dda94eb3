"""The blocks of docs/integrations.md, run as they stand."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from public import import_timm
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import batchnorm as bn

PAGE = (Path(__file__).parents[2] / "docs" / "integrations.md").read_text()


def blocks(title):
    """The code under a heading."""
    section = PAGE.split(f"## {title}\n")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_lightning(tmp_path, monkeypatch):
    import lightning.pytorch as pl

    monkeypatch.chdir(tmp_path)

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, index):
            return self.net(batch[0]).square().mean()

        validation_step = training_step

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    options = {
        "max_epochs": 1, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
        "accelerator": "cpu",
    }  # fmt: skip
    loader = DataLoader(TensorDataset(torch.randn(24, 4)), 8)
    (block,) = blocks("Lightning")
    exec(block, {"Trainer": pl.Trainer, "options": options, "module": Module(), "loader": loader})
    assert bn.open_run("runs/mine").steps.tolist() == [0, 1, 2]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_transformers(tmp_path, monkeypatch):
    from transformers import Trainer, TrainingArguments

    monkeypatch.chdir(tmp_path)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))

        def forward(self, x, labels):
            return {"loss": self.net(x).square().mean() + 0 * labels.sum()}

    arguments = TrainingArguments("out", num_train_epochs=1, report_to=[], use_cpu=True, save_strategy="no")
    data = [{"x": torch.randn(4), "labels": 0} for _ in range(24)]
    (block,) = blocks("Transformers")
    exec(block, {"Trainer": Trainer, "model": Net(), "arguments": arguments, "data": data})
    assert bn.open_run("runs/mine").steps.tolist() == [0, 1, 2]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("converted", [False, True])
def test_timm(tmp_path, monkeypatch, converted):
    """A loop as that of timm's train.py: its models, optimizers and average."""
    timm = import_timm()
    from timm.optim import create_optimizer_v2
    from timm.utils import ModelEmaV3

    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=3)
    if converted:
        bn.convert(model)
    optimizer = create_optimizer_v2(model, opt="momentum", lr=0.01)
    model_ema = ModelEmaV3(model, decay=0.5)
    loader_train = [(torch.randn(4, 3, 32, 32) * 2 + 1, torch.tensor([0, 1, 2, 0])) for _ in range(3)]
    before, after = blocks("timm")
    scope = {"model": model, "optimizer": optimizer, "model_ema": model_ema, "loader_train": loader_train}
    exec(before, scope)
    for x, target in loader_train:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), target).backward()
        optimizer.step()
        model_ema.update(model)
    exec(after, scope)
    run = bn.open_run("runs/timm")
    assert (run.status, run.recorded["steps"], run.steps[0]) == ("finished", 3, 0)
    first = next(m for m in model_ema.module.modules() if isinstance(m, nn.BatchNorm2d))
    stem = model_ema.module.conv1[0] if isinstance(model_ema.module.conv1, nn.Sequential) else model_ema.module.conv1
    with torch.no_grad():
        given = torch.cat([stem(x) for x, _ in loader_train]).double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(first.running_mean.double(), given.mean(1), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.processes
def test_torchrun(tmp_path):
    (block,) = blocks("torchrun")
    script = tmp_path / "script.py"
    script.write_text(block)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=200, env={**os.environ, "RUN": str(tmp_path / "run")}
    )
    assert done.returncode == 0, done.stderr
    run = bn.open_run(tmp_path / "run")
    assert (run.status, run.steps.tolist()) == ("finished", [0, 1, 2, 3, 4])
    assert set(run.counts("1")) == {16}  # of both ranks
    assert np.isfinite(run.probes("1", "batch_var")[1]).all()
