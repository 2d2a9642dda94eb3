"""What a run tells: each fault is planted in a small recorded training, and the same training without it is healthy."""

import inspect
import re

import numpy as np
import pytest
import torch
from synthetic import layer, probe_values, story, write_run
from torch import nn
from torch.utils.checkpoint import checkpoint

import batchnorm as bn
from batchnorm.diagnosis.rules import RULES

STEPS, SIZE = 80, 32


def record(path, *, change=lambda k, x: x, forward=lambda model, x: model(x), prepare=lambda model: None, after=None):
    """Train a small model for some steps; returns the run's folder."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))
    prepare(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.02)
    with bn.watch(model, path, optimizer=optimizer):
        for k in range(STEPS):
            x = change(k, torch.randn(SIZE, 6) * 2 + 1)
            loss = (forward(model, x)[:, 0] - x.sum(1)).square().mean()
            optimizer.zero_grad()
            if loss.isfinite():
                loss.backward()
            optimizer.step()
            if after:
                after(k, model)
    return path


def twice(model, x):
    model(x)
    return model(x)


def recomputed(model, x):
    return checkpoint(model, x, use_reentrant=False)


def in_parts(model, x):
    return torch.cat([model(part) for part in x.chunk(4)])


def without_update(model, x):
    with bn.no_update(model):
        model(x)
    return model(x)


def accumulated(model, x):
    with bn.accumulate(model):
        return in_parts(model, x)


def one_nan(k, x):
    return torch.where(torch.tensor(k == 30), torch.nan, x)


def two_streams(k, x):
    return x if k % 2 else x + 6


def three(k, x):
    return x[:3]


def odd(k, x):
    return x[:2] if k % 20 == 19 else x


def leaking(model):
    with torch.no_grad():
        model[1].weight.uniform_(0.5, 1.5)
    model[1].requires_grad_(False)


def frozen(model):
    leaking(model)
    bn.freeze(model)


def with_momentum(momentum):
    def prepare(model):
        model[1].momentum = momentum

    return prepare


def evaluated_in_train_mode(k, model):
    if k % 20 == 19:
        for x in torch.randn(5, SIZE, 6) * 2 + 1:
            model(x)


def evaluated(k, model):
    model.eval()
    evaluated_in_train_mode(k, model)
    model.train()


HEALTHY = [
    {},
    {"forward": without_update},
    {"forward": accumulated},
    {"prepare": with_momentum(None)},
    {"prepare": bn.convert, "forward": recomputed},
    {"after": evaluated},
]
FAULTY = [
    ({"forward": twice}, "updates", "warning", 0),
    ({"forward": recomputed}, "updates", "warning", 0),
    ({"forward": in_parts}, "updates", "warning", 0),
    ({"change": one_nan}, "nonfinite", "serious", 30),
    ({"change": two_streams}, "mixed-populations", "warning", None),
    ({"change": three}, "few-values", "serious", None),
    ({"change": odd}, "few-values", "warning", None),
    ({"prepare": leaking}, "freeze-leak", "serious", 0),
    ({"prepare": with_momentum(0.9)}, "momentum", "serious", None),
    ({"prepare": with_momentum(0.002)}, "unconverged", "serious", 0),
    ({"after": evaluated_in_train_mode}, "mode", "serious", 20),
]


@pytest.mark.parametrize("how", HEALTHY, ids=[str([*how.values()][:1]).split(" at ")[0] for how in HEALTHY])
def test_a_healthy_run_has_no_finding(tmp_path, how):
    found = bn.diagnose(record(tmp_path / "run", **how))
    assert [(finding.rule, finding.severity) for finding in found] == []


@pytest.mark.parametrize(("how", "rule", "severity", "since"), FAULTY, ids=[fault[1] for fault in FAULTY])
def test_a_fault_is_found(tmp_path, how, rule, severity, since):
    run = bn.open_run(record(tmp_path / "run", **how))
    found = [finding for finding in bn.diagnose(run) if finding.rule == rule]
    assert [(finding.layer, finding.severity, finding.since_step) for finding in found] == [("1", severity, since)]


def test_how_many_updates_a_step_makes(tmp_path):
    for forward, expected in ((twice, 2), (in_parts, 4)):
        found = bn.diagnose(record(tmp_path / forward.__name__, forward=forward))
        # By what the running mean did, not by counting forwards: exact for one batch twice, else up to noise.
        assert found[0].numbers["updates"] == pytest.approx(expected, rel=1e-3 if forward is twice else 0.1)


def test_probes_of_two_populations(tmp_path):
    info = layer(channels=4)
    probes = probe_values([50], 12, 4)
    healthy = bn.diagnose(write_run(tmp_path / "healthy", [info], [story(info, 60)], probes=probes))
    assert "mixed-populations" not in {finding.rule for finding in healthy}
    probes[50][::3, 0] += 5
    found = bn.diagnose(write_run(tmp_path / "mixed", [info], [story(info, 60)], probes=probes))
    (mixed,) = [finding for finding in found if finding.rule == "mixed-populations"]
    assert {mixed.numbers["one"], mixed.numbers["other"]} == {4, 8}


def test_layers_of_one_finding_begin_at_their_own_steps(tmp_path):
    infos = [layer(f"bn{i}") for i in range(1, 5)]
    values = [story(info, 60, seed) for seed, info in enumerate(infos)]
    began = [41, 30, 35, 33]
    for of_layer, step in zip(values, began, strict=True):
        of_layer["running_mean"][step:, 0] = np.nan
    found = bn.diagnose(write_run(tmp_path / "run", infos, values))
    (one,) = [finding for finding in found if finding.rule == "nonfinite"]
    assert (one.layers, one.since_step) == (("bn1", "bn2", "bn3", "bn4"), 30)
    assert [each.since_step for each in one.each] == began
    assert "in bn1, bn2, bn3, bn4, since steps 30 to 41" in str(found)
    three = bn.diagnose(write_run(tmp_path / "three", infos[:3], values[:3]))
    assert [finding.layer for finding in three if finding.rule == "nonfinite"] == ["bn1", "bn2", "bn3"]


def test_odd_runs(tmp_path):
    assert bn.diagnose(write_run(tmp_path / "empty")) == []
    info = layer(tracks=False, affine=False)
    (found,) = bn.diagnose(write_run(tmp_path / "bare", [info], [story(info, 30)]))
    assert (found.rule, found.severity) == ("mode", "note")
    info = layer()
    short = write_run(tmp_path / "short", [info], [story(info, 1)])
    assert {finding.rule for finding in bn.diagnose(short)} <= {"unconverged"}
    values = story(info, 30)
    for vectors in values.values():
        vectors[:] = np.nan
    assert bn.diagnose(write_run(tmp_path / "nan", [info], [values])).serious[0].rule == "nonfinite"


@pytest.mark.parametrize(("gradient", "expected"), [(None, "serious"), (1e-6, None), (0.0, None), (0.1, "warning")])
def test_gamma_that_could_not_move_is_not_frozen(tmp_path, gradient, expected):
    """A gradient of 1e-6 rounds away beside a gamma of 1."""
    info = layer()
    values = story(info, 30)
    for quantity in ("gamma", "beta"):
        values[quantity][:] = values[quantity][-1]
        values[f"{quantity}_grad"][:] = np.nan if gradient is None else gradient
    path = write_run(
        tmp_path / "run", [info], [values], without=("gamma_grad", "beta_grad") if gradient is None else ()
    )
    found = [finding for finding in bn.diagnose(path) if finding.rule == "freeze-leak"]
    assert [finding.severity for finding in found] == ([expected] if expected else [])


def test_tiny_gradients_of_a_real_training(tmp_path):
    """Trained before, by a loss of which next to nothing reaches gamma and beta."""

    def prepare(model):
        nn.init.uniform_(model[1].weight, 0.5, 1.5)
        nn.init.uniform_(model[1].bias, 0.5, 1.5)
        with torch.no_grad():
            model[3].weight.mul_(1e-7)
        model[3].requires_grad_(False)

    def forward(model, x):
        return model(x) + x.sum(1, keepdim=True).detach()

    path = record(tmp_path / "run", prepare=prepare, forward=forward)
    gammas = bn.open_run(path).vectors("1", "gamma")[1]
    assert (gammas == gammas[0]).all()
    assert bn.diagnose(path).serious == []


def test_an_experiment_is_judged_by_its_main_arm(tmp_path):
    info = layer("bn")
    write_run(tmp_path / "e", arms=["learned"])
    values = story(info, 60)
    values["gamma"][50:, 0] = np.inf
    write_run(tmp_path / "e" / "learned", [info], [values])
    (found,) = bn.diagnose(tmp_path / "e").serious
    assert (found.rule, found.since_step) == ("nonfinite", 50)


def test_every_rule_says_what_it_can_judge():
    sources = {rule.name: rule.sources for rule in RULES}
    assert len(sources) == len(RULES)
    assert all(sources.values())
    assert sources["unconverged"] == ("layer", "run", "measured")
    assert sources["ranks-disagree"] == ("copies",)


@pytest.mark.parametrize("rule", RULES, ids=[rule.name for rule in RULES])
def test_remedies_name_what_there_is(rule):
    source = inspect.getsource(inspect.getmodule(type(rule)))
    for name in re.findall(r"\bbn\.(\w+)", source):
        assert hasattr(bn, name)


def sorted_by_sum(k, x):
    """Of an epoch of 20 batches of sorted data the k-th."""
    generator = torch.Generator().manual_seed(1)
    data = torch.randn(20 * SIZE, 6, generator=generator) * 2 + 1
    return data[data.sum(1).argsort()].view(20, SIZE, 6)[k % 20]


def test_unshuffled_data_are_not_taken_for_noise(tmp_path):
    found = bn.diagnose(record(tmp_path / "sorted", change=sorted_by_sum))
    assert ("mixed-populations", "warning") in {(finding.rule, finding.severity) for finding in found}
    assert "few-values" not in {finding.rule for finding in found}
    turns = torch.randint(20, (STEPS,), generator=torch.Generator().manual_seed(0)).tolist()
    in_turn = bn.diagnose(record(tmp_path / "in turn", change=lambda k, x: sorted_by_sum(turns[k], x)))
    assert "which are alike" in next(finding.evidence for finding in in_turn if finding.rule == "few-values")


class Images(nn.Module):
    """Batches of one image have many values a channel."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x):
        return self.bn(self.conv(x)).relu().mean((2, 3)).sum(1)


@pytest.mark.parametrize(("size", "expected"), [(1, True), (2, True), (16, False)])
def test_a_run_with_few_images_a_batch(tmp_path, size, expected):
    torch.manual_seed(0)
    model = Images()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    with bn.watch(model, tmp_path / "run", optimizer=optimizer):
        for _ in range(60):
            x = torch.randn(size, 1, 8, 8) * torch.rand(size, 1, 1, 1) * 2  # each of its own contrast
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    assert ("few-values" in {finding.rule for finding in bn.diagnose(tmp_path / "run")}) == expected


def test_train_mode_forgotten_after_an_evaluation(tmp_path):
    def forget(k, model):
        if k == 26:
            model.eval()

    found = bn.diagnose(record(tmp_path / "run", after=forget))
    assert [(finding.rule, finding.severity, finding.since_step) for finding in found] == [("mode", "warning", 27)]
    assert (found[0].numbers["steps"], found[0].numbers["recorded"]) == (53, 80)


def test_freezing_for_the_last_steps_is_a_note_at_most(tmp_path):
    def finish(k, model):
        if k == 49:
            bn.freeze(model)

    (found,) = bn.diagnose(record(tmp_path / "run", after=finish))
    assert (found.rule, found.severity) == ("mode", "note")
    assert "unless they were frozen on purpose" in found.evidence

    def freeze_all(k, model):
        if k == 49:
            bn.freeze(model, affine=True)

    assert bn.diagnose(record(tmp_path / "all", after=freeze_all)) == []
