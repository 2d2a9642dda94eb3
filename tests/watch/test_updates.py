"""Worked steps: what the rules predict from what was recorded is what torch's optimizers have made of it."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.runs.explain import explain

WORKED = [0, 1, 2, 3, 4, 5, 8, 9, 16, 17]
SGD = [
    {},
    {"weight_decay": 0.1},
    {"momentum": 0.9},
    {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    {"momentum": 0.9, "maximize": True, "weight_decay": 0.1},
]
ADAM = [
    {},
    {"weight_decay": 0.1},
    {"amsgrad": True, "betas": (0.5, 0.7), "eps": 1e-3},
    {"maximize": True, "weight_decay": 0.1, "amsgrad": True},
]
KINDS = [(torch.optim.SGD, options) for options in SGD]
KINDS += [(kind, options) for kind in (torch.optim.Adam, torch.optim.AdamW) for options in ADAM]


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3), nn.BatchNorm1d(3))


def batch(k):
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(k)) * (1 + k % 3)


def loss_of(model, k):
    target = torch.randn(8, 3, generator=torch.Generator().manual_seed(100 + k))
    return (model(batch(k)) - target).square().sum()


def train(folder, model, optimizer, steps=20, watched=None, after=lambda k: None, **options):
    """Returns gamma and beta of the layers before each step and after the last, as the model itself has them."""
    seen = []
    with bn.watch(model, folder, optimizer=watched, **options):
        for k in range(steps):
            seen.append({name: p.detach().double().numpy().copy() for name, p in model.named_parameters()})
            optimizer.zero_grad()
            loss_of(model, k).backward()
            optimizer.step()
            after(k)
    seen.append({name: p.detach().double().numpy().copy() for name, p in model.named_parameters()})
    return seen


def checked(folder, seen=None, layers=("1", "4"), rounding=2**-23):
    """Every recorded step of every channel: the prediction is what was recorded; returns the updates."""
    run = bn.open_run(folder)
    assert run.damage == []
    found = []
    for layer in layers:
        for update in run.updates(layer):
            found.append(update)
            for quantity, name in (("gamma", "weight"), ("beta", "bias")):
                change = getattr(update, quantity)
                if change is None:
                    continue
                if seen is not None:
                    np.testing.assert_array_equal(change.before, seen[update.step][f"{layer}.{name}"])
                    np.testing.assert_array_equal(change.after, seen[update.step + 1][f"{layer}.{name}"])
                for channel in update.channels:
                    explained = explain(update, int(channel), quantity)
                    assert explained.recorded == change.after[channel]
                    assert explained.predicted is not None
                    # A dozen roundings, each of a number no larger than these.
                    size = abs(change.before[channel]) + abs(explained.predicted - change.before[channel])
                    assert abs(explained.predicted - explained.recorded) <= 12 * rounding * size, explained
    return found


@pytest.mark.parametrize("way", ["foreach", "fused", "for loop"])
@pytest.mark.parametrize(("kind", "options"), KINDS, ids=lambda value: getattr(value, "__name__", str(value)))
def test_prediction_is_what_the_optimizer_does(tmp_path, kind, options, way):
    model = network()
    ways = {"foreach": way == "foreach", "fused": way == "fused"}
    optimizer = kind(model.parameters(), lr=0.01, **options, **ways)
    seen = train(tmp_path / "run", model, optimizer, watched=optimizer, steps=9)
    updates = checked(tmp_path / "run", seen)
    assert [update.step for update in updates] == WORKED[:7] * 2
    assert {update.gamma.optimizer for update in updates} == {kind.__name__}
    moved = [abs(update.gamma.after - update.gamma.before).max() for update in updates]
    assert min(moved) > 1e-5  # the steps are large against their rounding


def test_without_an_optimizer_given_its_hooks_are_found(tmp_path):
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    seen = train(tmp_path / "run", model, optimizer)
    assert [update.step for update in checked(tmp_path / "run", seen)] == WORKED * 2


def test_each_parameter_has_the_options_of_its_own_group(tmp_path):
    model = network()
    groups = [
        {"params": [model[0].weight, model[1].weight], "lr": 0.1, "name": "decayed", "weight_decay": 0.5},
        {"params": [model[1].bias, model[4].weight], "lr": torch.tensor(0.02)},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.5)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    seen = train(tmp_path / "run", model, optimizer, watched=optimizer, after=lambda k: scheduler.step())
    first = checked(tmp_path / "run", seen, ["1"])
    second = checked(tmp_path / "run", seen, ["4"])
    for update in first:
        assert update.gamma.options["lr"] == 0.1 * 0.5**update.step
        assert update.beta.options["lr"] == pytest.approx(0.02 * 0.5**update.step)
        assert (update.gamma.options["weight_decay"], update.beta.options["weight_decay"]) == (0.5, 0)
    assert {update.beta for update in second} == {None}  # in no group: nothing moves it
    lines = (tmp_path / "run" / "optimizers.jsonl").read_text().splitlines()
    assert len(lines) == 2 * len(WORKED)  # one that beta of the one layer and gamma of the other share


def test_what_gets_no_gradient_is_left_out(tmp_path):
    model = nn.Sequential(
        nn.Linear(4, 3), nn.BatchNorm1d(3, affine=False), nn.BatchNorm1d(3), nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    )
    model[2].weight.requires_grad_(False)
    model[3].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(tmp_path / "run", model, optimizer, watched=optimizer, steps=6)
    run = bn.open_run(tmp_path / "run")
    assert run.updates("1") == run.updates("3") == []
    assert {update.gamma for update in run.updates("2")} == {None}
    assert len(checked(tmp_path / "run", None, ["2", "4"])) == 12
    with pytest.raises(KeyError, match="did not update gamma in step 5"):
        explain(run.updates("2")[-1], 0)


@pytest.mark.parametrize("fused", [True, False])
def test_scaled_gradients(tmp_path, fused):
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=100)
    with bn.watch(model, tmp_path / "run", optimizer=optimizer):
        for k in range(6):
            optimizer.zero_grad()
            loss = loss_of(model, k) * (float("inf") if k == 3 else 1)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
    run = bn.open_run(tmp_path / "run")
    if not fused:  # a step that the scaler skips is none
        assert [update.step for update in checked(tmp_path / "run")] == [0, 1, 2, 3, 4] * 2
        return
    for update in run.updates("1"):
        explained = explain(update, 2)
        assert update.gamma.skipped == (update.step == 3)
        if update.step == 3:
            assert (explained.predicted, explained.recorded) == (None, update.gamma.before[2])
            assert "not finite" in explained.note
        else:
            assert explained.predicted == pytest.approx(explained.recorded, rel=2**-20)


def test_closures(tmp_path):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    with bn.watch(model, tmp_path / "run", optimizer=optimizer):
        for k in range(6):

            def closure(k=k):
                optimizer.zero_grad()
                loss = loss_of(model, k)
                loss.backward()
                return loss

            optimizer.step(closure)
    assert len(checked(tmp_path / "run")) == 12


class Signs(torch.optim.SGD):
    """A rule of somebody's own, beneath a name that is torch's."""

    def step(self, closure=None):
        with torch.no_grad():
            for parameter in self.param_groups[0]["params"]:
                parameter -= self.param_groups[0]["lr"] * parameter.grad.sign()


def test_a_rule_that_is_not_spelled_out(tmp_path):
    Signs.__qualname__ = Signs.__name__ = "SGD"
    model = network()
    train(tmp_path / "signs", model, optimizer := Signs(model.parameters(), lr=0.1), watched=optimizer, steps=3)
    model = network()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)
    with bn.watch(model, tmp_path / "lbfgs", optimizer=optimizer):
        for _ in range(3):

            def closure():
                optimizer.zero_grad()
                loss = loss_of(model, 0)
                loss.backward()
                return loss

            optimizer.step(closure)
    for name, called in (("signs", f"{__name__}.SGD"), ("lbfgs", "LBFGS")):
        updates = bn.open_run(tmp_path / name).updates("1")
        assert len(updates) == 3
        for update in updates:
            explained = explain(update, 1, "beta")
            assert update.beta.optimizer == called
            assert explained.predicted is None
            assert explained.note == f"The rule of {called} is not spelled out here."
            assert [term.name for term in explained.terms] == ["beta before", "gradient", "beta after"]
            assert [term.value for term in explained.terms] == [
                values[1] for values in (update.beta.before, update.beta.gradient, update.beta.after)
            ]


def test_a_step_that_fails_is_no_update(tmp_path):
    """Neither then nor when the optimizer steps again, in a step that is not recorded."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    real, failing = optimizer.step, {6}

    with bn.watch(model, tmp_path / "run", every=3) as w:
        for k in range(12):
            optimizer.zero_grad()
            loss_of(model, k).backward()
            if k in failing:
                handle = optimizer.register_step_pre_hook(lambda *_: (_ for _ in ()).throw(ZeroDivisionError()))
                with pytest.raises(ZeroDivisionError):
                    real()
                handle.remove()
            else:
                real()
        assert w.step == 12
    assert [update.step for update in checked(tmp_path / "run", None, ["1"])] == [0, 3, 9]


def test_half_precision_says_what_it_rounds_to(tmp_path):
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).to(torch.bfloat16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with bn.watch(model, tmp_path / "run", optimizer=optimizer):
        for k in range(2):
            optimizer.zero_grad()
            model(batch(k).bfloat16()).square().sum().backward()
            optimizer.step()
    assert {u.gamma.dtype for u in checked(tmp_path / "run", None, ["1"], rounding=2**-8)} == {"bfloat16"}


def test_many_channels_are_thinned_evenly(tmp_path):
    model = nn.Sequential(nn.Linear(2, 9000), nn.BatchNorm1d(9000), nn.Linear(9000, 2), nn.BatchNorm1d(2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with bn.watch(model, tmp_path / "run", optimizer=optimizer):
        model(torch.randn(4, 2)).square().sum().backward()
        before = model[1].weight.detach().clone()
        optimizer.step()
    run = bn.open_run(tmp_path / "run")
    wide, narrow = run.updates("1")[0], run.updates("3")[0]
    assert narrow.channels.tolist() == [0, 1]
    assert (wide.channels[0], wide.channels[-1]) == (0, 8999)
    assert 6900 < len(wide.channels) < 7000
    assert set(np.diff(wide.channels)) == {1, 2}
    np.testing.assert_array_equal(wide.gamma.before, before.numpy()[wide.channels])
    np.testing.assert_array_equal(wide.gamma.after, model[1].weight.detach().numpy()[wide.channels])
    missing = int(np.setdiff1d(np.arange(9000), wide.channels)[0])
    with pytest.raises(KeyError, match=f"channel {missing} was not kept"):
        explain(wide, missing)
    assert 50 * (tmp_path / "run" / "updates-0001.bin").stat().st_size < 17 << 20


def test_none_are_kept_without_a_budget_or_in_an_unchosen_record(tmp_path):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    train(tmp_path / "none", model, optimizer, watched=optimizer, vector_bytes=0)
    assert bn.open_run(tmp_path / "none").updates("1") == []
    seen = train(tmp_path / "thirds", model, optimizer, watched=optimizer, every=3)
    updates = checked(tmp_path / "thirds", seen, ["1"])
    assert [update.step for update in updates] == [0, 3, 6, 9, 12, 15]


def test_numbers_in_the_formulas_are_those_of_the_step(tmp_path):
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1, amsgrad=True)
    train(tmp_path / "run", model, optimizer, watched=optimizer)
    for update, channel in itertools.product(bn.open_run(tmp_path / "run").updates("1"), range(5)):
        for term in explain(update, channel).terms:
            if term.numbers:
                from math import sqrt

                value = eval(term.numbers.replace("^", "**"), {"sqrt": sqrt, "max": max})
                assert value == pytest.approx(term.value, rel=1e-4), term
