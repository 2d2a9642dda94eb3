"""every="auto": as many records as cost at most a share of the training's time."""

import json
import re
from importlib import import_module

import numpy as np
import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.watch.schedule import WithinShare


class World:
    """A clock, and what recording costs by it."""

    def __init__(self, step, record, late=0.0):
        self.now = self.spent = self._late = 0.0
        self._step, self._record, self._by_writer = step, record, late

    def train(self, steps, share=0.02, records=0):
        plan = WithinShare(share, records, lambda: self.spent, lambda: self.now)
        recorded = []
        for step in range(steps):
            index = plan.index(step)
            self.now += self._step
            self.spent += self._late
            self._late = 0.0
            if index is not None:
                recorded.append((step, index))
                self.now += self._record
                self.spent += self._record
                self._late = self._by_writer
        return recorded


@pytest.mark.parametrize(
    ("step", "record", "late"), [(1e-3, 2e-4, 0), (1e-3, 2e-4, 1e-4), (0.3, 2e-3, 1e-3), (1e-3, 0.01, 0)]
)
def test_the_share_is_kept_and_used(step, record, late):
    world = World(step, record, late)
    recorded = world.train(20_000)
    share = world.spent / world.now
    assert share <= 0.02 * 1.01 + (record + late) / world.now
    # What is left unused is at most a step's rounding, where a record's debt is paid off within a step.
    assert share > 0.018 or len(recorded) == 20_000
    assert recorded[0] == (0, 0)
    assert [index for _, index in recorded] == list(range(len(recorded)))
    gaps = np.diff([at for at, _ in recorded])
    assert gaps[len(gaps) // 2 :].max() <= 2 * gaps[len(gaps) // 2 :].min()  # even


def test_cheap_records_are_all_taken():
    assert len(World(1.0, 1e-3).train(100)) == 100


def test_what_cannot_be_paid_is_recorded_seldom():
    assert [at for at, _ in World(1e-6, 1.0).train(2500)] == [0, 1000, 2000]


def test_a_pause_is_no_credit():
    world = World(1e-3, 2e-4)
    plan = WithinShare(0.02, 0, lambda: world.spent, lambda: world.now)
    world.now += 1000.0
    taken = []
    for step in range(40):
        taken.append(plan.index(step) is not None)
        world.now += 1e-3
        if taken[-1]:
            world.spent += 2e-4
    assert sum(taken) == 4  # one in ten, from the first on


@pytest.fixture
def generous(monkeypatch):
    """A share under which a few hundred tiny steps are enough to see some recorded and some not."""
    monkeypatch.setattr(import_module("batchnorm.watch.recorder"), "MEASURED_SHARE", 0.2)


def train(model, folder, steps, **options):
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    generator = torch.Generator().manual_seed(0)
    truth = []
    with bn.watch(
        model, folder, optimizer=optimizer if options.pop("given", True) else None, every="auto", **options
    ) as w:
        for _ in range(steps):
            x = torch.randn(8, 4, generator=generator)
            optimizer.zero_grad()
            truth.append(model[0](x).mean(0).detach().numpy())
            model(x).square().mean().backward()
            optimizer.step()
        hooks = sum(len(m._forward_hooks) for m in model.modules())
    return truth, w.step, hooks


def build(norm=nn.BatchNorm1d):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), norm(3), nn.Linear(3, 1))


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("norm", [nn.BatchNorm1d, bn.BatchNorm1d])
def test_records_are_of_their_steps_and_the_run_says_how_many(tmp_path, generous, norm, given):
    truth, steps, _ = train(build(norm), tmp_path, 300, given=given)
    run = bn.open_run(tmp_path)
    assert steps == 300
    assert run.steps[0] == 0
    assert 2 <= len(run.steps) < 300
    np.testing.assert_allclose(run.vectors("1", "batch_mean")[1], [truth[k] for k in run.steps], atol=1e-5)
    assert set(run.forwards("1")) == {1}
    assert np.isfinite(run.vectors("1", "gamma_grad")[1]).all()
    facts = json.loads((tmp_path / "run.json").read_bytes())
    assert facts["every"] == "auto"
    assert facts["recorded"] == {**facts["recorded"], "steps": 300, "records": len(run.steps)}
    assert 0 < facts["recorded"]["share_of_time"] < 1
    assert run.recorded == facts["recorded"]


def test_hooks_are_out_of_the_way_in_between(tmp_path):
    model = build()
    _, _, hooks = train(model, tmp_path, 200)
    assert hooks in (0, 1)  # 1 while a step is recorded
    assert len(model._forward_pre_hooks) == 0
    assert sum(len(m._forward_hooks) for m in model.modules()) == 0


@pytest.mark.slow
def test_compiled(tmp_path, generous):
    """Inverted from how the running statistics moved in the recorded step, which has to be known from its start."""
    torch._dynamo.reset()
    model = build()
    compiled = torch.compile(model, backend="eager")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    truth = []
    with bn.watch(compiled, tmp_path, optimizer=optimizer, every="auto"):
        for x in torch.randn(300, 8, 4, generator=torch.Generator().manual_seed(0)):
            optimizer.zero_grad()
            truth.append(model[0](x).mean(0).detach().numpy())
            compiled(x).square().mean().backward()
            optimizer.step()
    run = bn.open_run(tmp_path)
    assert 2 <= len(run.steps) < 300
    np.testing.assert_allclose(run.vectors("1", "batch_mean")[1], [truth[k] for k in run.steps], atol=1e-4)
    assert set(run.counts("1")) == {8}


def test_going_on_appends(tmp_path, generous):
    train(build(), tmp_path, 300)
    before = bn.open_run(tmp_path).steps.tolist()
    train(build(), tmp_path, 100, resume_step=200)
    run = bn.open_run(tmp_path)
    assert run.steps.tolist()[: sum(k < 200 for k in before)] == [k for k in before if k < 200]
    assert 200 in run.steps
    assert run.recorded["records"] == len(run.steps)


def test_what_every_may_be(tmp_path):
    for every in (0, -1, "often", 1.5):
        with pytest.raises(ValueError, match='every must be at least 1, or "auto"'):
            bn.watch(build(), tmp_path / "run", every=every)


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, bn.BatchNorm1d])
def test_numbers_logged_within_a_step_belong_to_it(tmp_path, norm):
    model = build(norm)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with bn.watch(model, tmp_path, optimizer=optimizer, every="auto") as w:
        for k in range(20):
            loss = model(torch.randn(8, 4)).sum()
            w.log(within=k)
            loss.backward()
            optimizer.step()
            w.log(after=k)
    assert [row["step"] for row in bn.open_run(tmp_path).scalars()] == [k // 2 for k in range(40)]


def test_show_and_the_page_say_how_much_was_recorded(tmp_path, generous, capsys):
    from batchnorm.view import terminal

    train(build(), tmp_path, 300)
    run = bn.open_run(tmp_path)
    said = rf"{len(run.steps)} recorded steps of 300 taken, which took [\d.]+% of the time"
    terminal.show(run)
    assert re.search(said, " ".join(capsys.readouterr().out.split()))
    assert re.search(said, bn.report(run).read_text())
