"""Every rule's remedy, as printed: it runs, and leaves what a healthy trained model computes as it is, or says so."""

import copy

import pytest
import torch
from synthetic import layer, story, write_run
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import batchnorm as bn
from batchnorm.diagnosis.rules import RULES

SIZE, WIDTH = 32, 6
CHANGES = "changes what eval mode computes"  # what a remedy says that does


class Net(nn.Module):
    """With a bias before a batch norm, small variances, and batch norms over (N, C) and over (N, C, L)."""

    def __init__(self):
        super().__init__()
        self.first, self.bn1 = nn.Linear(WIDTH, 8), nn.BatchNorm1d(8)
        self.conv, self.bn2 = nn.Conv1d(1, 4, 3), nn.BatchNorm1d(4)
        self.last = nn.Linear(24, 2)

    def forward(self, x):
        x = torch.relu(self.bn1(self.first(x)))
        return self.last(torch.relu(self.bn2(self.conv(x[:, None]))).flatten(1))


def data(batches=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batches, SIZE, WIDTH, generator=generator) * 0.02
    return [(each, (each.sum(1) > 0).long()) for each in x]


@pytest.fixture(scope="module")
def healthy():
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for _ in range(8):
        for x, y in data():
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model.eval()


def of_layer(plant):
    """What is found in a model after a fault was planted in both its batch norms."""

    def find(model, tmp_path):
        for each in (model.bn1, model.bn2):
            plant(each)
        return bn.diagnose(model)

    return find


def nan_statistics(norm):
    norm.running_mean[0] = torch.nan


def nan_gamma(norm):
    norm.weight.data[0] = torch.nan


def leaking(norm):
    norm.requires_grad_(False)


def reset(norm):
    norm.reset_running_stats()


def set_to(name, value):
    return of_layer(lambda norm: setattr(norm, name, value))


def dead(norm):
    norm.weight.data[0] = 0


def without_statistics(norm):
    norm.running_mean = norm.running_var = norm.num_batches_tracked = None
    norm.track_running_stats = False


def in_train_mode(model, tmp_path):
    model.bn2.train()
    return bn.diagnose(model)


def in_eval_mode(model, tmp_path):
    model.train()
    model.bn1.eval()
    model.bn2.eval()
    return bn.diagnose(model)


def decayed(model, tmp_path):
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, betas=(0.8, 0.99), weight_decay=0.03)
    return bn.diagnose(model, optimizer=optimizer)


def fresh(model, tmp_path):
    return bn.diagnose(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))


def as_it_is(model, tmp_path):
    return bn.diagnose(model)


def small_eps(model, tmp_path):
    model.bn1.eps = 1.0
    return bn.diagnose(model)


def constant_channel(norm):
    norm.running_var[:2] = 0


def on_batches(change, **options):
    def find(model, tmp_path):
        change(model)
        return bn.diagnose(model, data(), loss=F.cross_entropy, **options)

    return find


def elsewhere(model):
    model.bn1.running_mean += 3
    model.bn2.running_var *= 30


def of_another_range(model, tmp_path):
    return bn.diagnose(model, [(x * 255, y) for x, y in data()], loss=F.cross_entropy)


def without_buffers(model, tmp_path):
    return bn.diagnose(dict(model.named_parameters()))


def small_batches(model, tmp_path):
    return bn.diagnose(model, [(x[:3], y[:3]) for x, y in data()], loss=F.cross_entropy)


def a_last_one(model, tmp_path):
    x = torch.cat([x for x, _ in data()])[:65]
    return bn.diagnose(model, DataLoader(TensorDataset(x), batch_size=16), max_batches=4)


def two_streams(model, tmp_path):
    return bn.diagnose(model, [(x if i % 2 else x + 1, y) for i, (x, y) in enumerate(data())])


def eval_needs_batches(model, tmp_path):
    """What recalibrating cannot mend: batches of one class each, by which train mode tells them apart."""
    batches = [(x + 3 * i, y) for i, (x, y) in enumerate(data())]
    return bn.diagnose(model, batches, loss=F.cross_entropy)


def wrong_axis(model, tmp_path):
    return bn.diagnose(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(7)))


def padded(model, tmp_path):
    norm = bn.BatchNorm1d(5)
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(4, 21, (12, SIZE), generator=generator)
    mask = torch.arange(20) < lengths[..., None]
    batches = list((torch.randn(12, SIZE, 5, 20, generator=generator) + 2) * mask[:, :, None])
    for x in batches:
        norm(x)
    return bn.diagnose(nn.ModuleDict({"bn2": norm}), batches, call=lambda net, x: net["bn2"](x))


def ranks(change):
    def find(model, tmp_path):
        other = copy.deepcopy(model)
        with torch.no_grad():
            change(other.bn1)
            change(other.bn2)
        return bn.diagnose([model, other])

    return find


def other_statistics(norm):
    norm.running_mean += 1


def other_gamma(norm):
    norm.weight += 1


def a_run(**changes):
    """A recorded training of bn1 and bn2, with other forwards or vectors."""

    def find(model, tmp_path):
        infos = [layer("bn1"), layer("bn2")]
        values = [story(info, 60, seed) for seed, info in enumerate(infos)]
        for of_layer in values:
            for quantity, change in changes.items():
                of_layer[quantity] = change(of_layer[quantity])
        return bn.diagnose(write_run(tmp_path / "run", infos, values))

    return find


def twice(running):
    """Moved by two updates a step."""
    moved = running.copy()
    for k in range(1, len(moved)):
        batch = (running[k] - 0.9 * running[k - 1]) / 0.1
        moved[k] = 0.81 * moved[k - 1] + 0.19 * batch
    return moved


CASES = [
    ("eval-gap", on_batches(elsewhere)),
    ("eval-gap", eval_needs_batches),
    ("preprocessing", of_another_range),
    ("untracked", without_buffers),
    ("unconverged", on_batches(elsewhere)),
    ("nonfinite", of_layer(nan_statistics)),
    ("nonfinite", of_layer(nan_gamma)),
    ("freeze-leak", of_layer(leaking)),
    ("updates", a_run(running_mean=twice)),
    ("few-values", small_batches),
    ("few-values", a_last_one),
    ("momentum", set_to("momentum", 0.99)),
    ("momentum", set_to("momentum", 0.0)),
    ("ranks-disagree", ranks(other_statistics)),
    ("ranks-disagree", ranks(other_gamma)),
    ("padding", padded),
    ("untracked", of_layer(reset)),
    ("mixed-populations", two_streams),
    ("bias", as_it_is),
    ("bias", fresh),
    ("small-variance", small_eps),
    ("small-variance", of_layer(constant_channel)),
    ("axis", wrong_axis),
    ("dead-channels", of_layer(dead)),
    ("decay", decayed),
    ("mode", in_train_mode),
    ("mode", in_eval_mode),
    ("mode", of_layer(without_statistics)),
]


@pytest.fixture
def alone():
    """A process group of one."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def printed(findings):
    """The remedy in a report of one finding."""
    _, _, after = str(findings).partition("  → ")
    lines, _, _ = after.partition("\nJudged: ")
    return "\n".join(line.removeprefix("    ") for line in lines.splitlines())


def test_every_rule_is_here():
    assert {rule for rule, _ in CASES} == {rule.name for rule in RULES}


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(("rule", "find"), CASES, ids=[f"{i} {case[0]}" for i, case in enumerate(CASES)])
def test_a_remedy_runs_and_harms_no_healthy_model(rule, find, healthy, tmp_path):
    found = [each for each in find(copy.deepcopy(healthy), tmp_path) if each.rule == rule]
    assert found
    good = tmp_path / "good.pt"
    torch.save(healthy.state_dict(), good)
    x, y = data(seed=1)[0]
    for finding in found:
        assert finding.remedy == printed(bn.diagnosis.Findings([finding]))
        model = copy.deepcopy(healthy)
        before = model(x)
        names = {
            "bn": bn,
            "torch": torch,
            "model": model if finding.layer not in ("0", "1") else nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)),
            "batch": x,
            "batches": data(seed=2),
            "micro_batches": x.chunk(4),
            "x": torch.randn(3, 4, 9),
            "mask": torch.ones(3, 9, dtype=torch.bool),
            "dataset": TensorDataset(x, y),
            "batch_size": 8,
            "path": tmp_path / "state.pt",
            "optimizer": torch.optim.AdamW(model.parameters(), 1e-3),
            "LAST_GOOD_CHECKPOINT": good,
        }
        exec(finding.remedy, names)  # as it is printed
        after = model.eval()(x)
        if CHANGES in finding.remedy:
            assert not after.isnan().any()
        else:
            torch.testing.assert_close(after, before)
