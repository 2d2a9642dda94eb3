"""diagnose(model, batches) and compare_modes(): what batches tell, and that nothing about the model is changed."""

import copy
import io
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import batchnorm as bn

BATCHES, SIZE = 12, 32


def data(seed=0, batches=BATCHES, size=SIZE, shape=(6,)):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batches, size, *shape, generator=generator) * 2 + 1
    return [(each, (each.flatten(1).sum(1) > 6).long()) for each in x]


def trained(batches, layers=None):
    torch.manual_seed(0)
    model = layers or nn.Sequential(nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for _ in range(8):
        for x, y in batches:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model


def rules(findings):
    return {(finding.rule, finding.severity) for finding in findings}


def everything(model):
    """All that a diagnosis might change, as bytes and identities."""
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    gradients = [None if p.grad is None else p.grad.tolist() for p in model.parameters()]
    attributes = [{k: v for k, v in vars(m).items() if k[:1] != "_"} for m in model.modules()]
    measured = [getattr(m, "_batchnorm_measured", None) for m in model.modules()]
    return (
        [type(m) for m in model.modules()],
        [id(b) for b in model.buffers()],
        buffer.getvalue(),
        hooks,
        gradients,
        attributes,
        [id(each) for each in measured],
        torch.get_rng_state().tolist(),
    )


def test_a_healthy_model():
    batches = data()
    assert bn.diagnose(trained(batches), batches, loss=F.cross_entropy) == []


def test_statistics_of_other_data():
    batches = data()
    model = trained(batches)
    model[1].running_mean -= 3
    found = bn.diagnose(model, batches, loss=F.cross_entropy)
    assert rules(found) == {("unconverged", "serious"), ("eval-gap", "serious")}
    assert [finding.layer for finding in found] == [None, "1"] or [f.layer for f in found] == ["1", None]
    # By definition: the root mean square of the differences over the measured standard deviation.
    x = torch.cat([x for x, _ in batches])
    with torch.no_grad():
        inner = model[0](x).double()
    expected = ((model[1].running_mean - inner.mean(0)) ** 2 / (inner.var(0, correction=0) + 1e-5)).mean().sqrt()
    drift = next(finding for finding in found if finding.rule == "unconverged")
    assert drift.numbers["mean_drift"] == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("ours", [False, True])
@pytest.mark.parametrize("mode", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_changed(ours, mode, fails):
    batches = data(batches=6)
    model = trained(batches, nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2)))
    if ours:
        bn.convert(model)
    model.train(mode)
    model(batches[0][0])
    before = everything(model)
    calls = 0

    def call(net, batch):
        nonlocal calls
        calls += 1
        if calls == fails_at:
            raise ZeroDivisionError
        return net(batch[0] + 0 * torch.rand(()))  # models may draw numbers in eval too

    # Six batches are measured, one step is taken on a copy, each of two modes and the recalibration go over all six,
    # and so does the last look. compare_modes alone begins with the modes.
    for look, in_all in ((bn.diagnose, 31), (bn.compare_modes, 24)):
        for number in (1, 4, 7, 9, 15, 21, in_all) if fails else (0,):
            calls, fails_at = 0, number
            with pytest.raises(ZeroDivisionError) if fails else nullcontext():
                look(model, batches, loss=F.cross_entropy, call=call)
            assert everything(model) == before
        assert calls == in_all


def test_a_watched_model_records_no_step_of_a_diagnosis(tmp_path):
    batches = data(batches=4)
    model = trained(batches)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with bn.watch(model, tmp_path / "run", optimizer=optimizer) as watched:
        for x, y in batches:
            F.cross_entropy(model(x), y).backward()
            bn.diagnose(model, batches, loss=F.cross_entropy)
            optimizer.step()
        assert watched.step == 4
    assert bn.open_run(tmp_path / "run").forwards("1").tolist() == [1] * 4


def test_few_values():
    batches = data(size=3)
    assert ("few-values", "serious") in rules(bn.diagnose(trained(batches), batches))
    batches = data(size=40)
    odd = [*batches, (batches[0][0][:2], batches[0][1][:2])]
    assert rules(bn.diagnose(trained(batches), odd)) == {("few-values", "warning")}


def test_a_batch_of_one():
    batches = data()
    lonely = [*batches, (batches[0][0][:1], batches[0][1][:1])]
    (found,) = bn.diagnose(trained(batches), lonely, loss=F.cross_entropy)
    assert (found.rule, found.severity) == ("few-values", "serious")
    assert "1 of 13 batches" in found.evidence
    x = torch.cat([x for x, _ in batches])[:65]
    for drop_last, expected in ((False, 1), (True, 0)):
        loader = DataLoader(TensorDataset(x), batch_size=16, drop_last=drop_last)
        found = bn.diagnose(trained(batches), loader, max_batches=4)
        assert sum(finding.rule == "few-values" for finding in found) == expected


def test_compare_modes_with_a_last_batch_of_one():
    """In train mode the last one is normalized by all that was seen: here the mean and variance of all the data."""
    batches = data(batches=2)
    model, (x, y) = trained(batches), (torch.cat(each) for each in zip(*batches, strict=True))
    x, y = x[:33], y[:33]
    result = bn.compare_modes(model, [(x[:32], y[:32]), (x[32:], y[32:])], F.cross_entropy)
    linear, norm, *rest = model
    with torch.no_grad():
        h = linear(x)
        last = (h[32:] - h.mean(0)) / (h.var(0, correction=0) + norm.eps).sqrt() * norm.weight + norm.bias
        z = torch.cat([F.batch_norm(h[:32], None, None, norm.weight, norm.bias, True), last])
        expected = F.cross_entropy(nn.Sequential(*rest)(z), y).item()
    assert result.train_loss == pytest.approx(expected, rel=1e-5)


def test_batches_of_one_each():
    """They are no *last* batch of one, and to drop it is no cure."""
    batches = data()
    model = trained(batches)
    x = torch.cat([x for x, _ in batches])[:40]
    loader = DataLoader(TensorDataset(x, torch.zeros(40, dtype=torch.long)), batch_size=1)
    (found,) = [f for f in bn.diagnose(model, loader, loss=F.cross_entropy) if f.rule == "few-values"]
    assert "32 of 32 batches" in found.evidence
    assert "batch_size=32" in found.remedy
    assert "drop_last" not in found.remedy


@pytest.mark.parametrize("size", [1, 2, 16])
def test_batches_of_few_images(size):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4))
    for _ in range(60):
        model(torch.randn(16, 1, 8, 8))
    found = [f for f in bn.diagnose(model, list(torch.randn(12, size, 1, 8, 8))) if f.rule == "few-values"]
    assert [finding.numbers["items"] for finding in found] == ([size] if size < 3 else [])


@pytest.mark.parametrize(("scale", "shift"), [(255, 0), (0.25, 0.4), (255, 100)])
def test_other_preprocessing_is_not_blamed_on_the_statistics(scale, shift):
    batches = data()
    model = trained(batches)
    found = bn.diagnose(model, [(x * scale + shift, y) for x, y in batches], loss=F.cross_entropy)
    (first,) = [finding for finding in found if finding.rule == "preprocessing"]
    assert first.severity == "serious"
    assert first.numbers["scale"] == pytest.approx(scale, rel=0.1)
    assert "unconverged" not in {finding.rule for finding in found}
    assert not any("recalibrate" in finding.remedy for finding in found)


def test_the_data_are_to_be_checked_where_already_the_first_layer_differs():
    batches = data()
    model = trained(batches)
    moved = [(x + torch.tensor([9.0, 0, 0, 0, 0, 0]), y) for x, y in batches]
    found = [f for f in bn.diagnose(model, moved, loss=F.cross_entropy) if f.rule in ("unconverged", "eval-gap")]
    assert len(found) == 2
    for finding in found:
        assert finding.remedy.splitlines()[0].startswith("# prepare the batches like the training data")
        assert finding.remedy.splitlines()[-1].startswith("bn.recalibrate")


def test_unshuffled_batches():
    batches = data()
    x = torch.cat([x for x, _ in batches])
    y = (x.sum(1) > 6).long()
    order = x.sum(1).argsort()
    ordered = list(zip(x[order].split(SIZE), y[order].split(SIZE), strict=True))
    found = bn.diagnose(trained(batches), ordered)
    assert ("mixed-populations", "warning") in rules(found)
    assert "few-values" not in {finding.rule for finding in found}


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU())
        self.outer = nn.Linear(8, 2)

    def forward(self, x):
        return self.outer(checkpoint(self.inner, x, use_reentrant=False))


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.norm, self.outer = nn.Linear(6, 6, bias=False), nn.BatchNorm1d(6), nn.Linear(6, 2)

    def forward(self, x):
        return self.outer(self.norm(self.inner(torch.relu(self.norm(self.inner(x))))))


def test_updates():
    batches = data()
    model = trained(batches, Checkpointed())
    (found,) = bn.diagnose(model, batches, loss=F.cross_entropy)
    assert (found.rule, found.numbers["updates"], found.layer) == ("updates", 2, "inner.1")
    assert bn.diagnose(bn.convert(model), batches, loss=F.cross_entropy) == []  # ours tell a recomputation
    assert ("updates", "warning") in rules(bn.diagnose(trained(batches, Shared()), batches))


def padded_sequences(seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(BATCHES, SIZE, 5, 20, generator=generator) + 2
    lengths = torch.randint(4, 21, (BATCHES, SIZE), generator=generator)
    mask = torch.arange(20) < lengths[..., None]
    return x, x * mask[:, :, None], mask


def test_padding():
    whole, padded, mask = padded_sequences()
    layer = bn.BatchNorm1d(5)
    for x, m in zip(padded, mask, strict=True):
        layer(x, mask=m)
    found = [finding for finding in bn.diagnose(layer, list(padded)) if finding.rule == "padding"]
    share = 1 - mask.float().mean().item()
    assert found[0].numbers["padded"] == pytest.approx(share, abs=0.03)  # a tail of one is not counted
    for batches, call in ((list(whole), None), (list(zip(padded, mask, strict=True)), lambda m, b: m(b[0], mask=b[1]))):
        assert "padding" not in {finding.rule for finding in bn.diagnose(layer, batches, call=call)}


def test_mixed_populations():
    batches = data()
    model = trained(batches)
    mixed = [(x if i % 2 else 4 - x, y) for i, (x, y) in enumerate(batches)]
    assert ("mixed-populations", "warning") in rules(bn.diagnose(model, mixed))
    shuffled = torch.cat([x for x, _ in mixed])[torch.randperm(BATCHES * SIZE)].split(SIZE)
    assert "mixed-populations" not in {rule for rule, _ in rules(bn.diagnose(model, shuffled))}


def test_the_axis_is_followed_through_modules():
    class Net(nn.Module):
        def __init__(self, right):
            super().__init__()
            self.embed, self.act, self.norm, self.right = nn.Linear(4, 7), nn.ReLU(), nn.BatchNorm1d(7), right

        def forward(self, x):
            y = self.act(self.embed(x))
            return self.norm(y.transpose(1, 2)) if self.right else self.norm(y)

    batches = list(torch.randn(8, 16, 7, 4))
    wrong = [finding for finding in bn.diagnose(Net(False), batches) if finding.rule == "axis"]
    assert "embed (Linear)" in wrong[0].evidence
    assert wrong[0].severity == "serious"
    assert "axis" not in {finding.rule for finding in bn.diagnose(Net(True), batches)}


def test_compare_modes_is_the_loss_of_each_mode():
    batches = data()
    model = trained(batches)
    model[1].running_var *= 9
    result = bn.compare_modes(model, batches, F.cross_entropy)
    twin = copy.deepcopy(model).train()
    with torch.no_grad():
        losses = [F.cross_entropy(twin(x), y).item() for x, y in batches]
        assert result.train_loss == pytest.approx(sum(losses) / BATCHES, rel=1e-6)
        x, y = (torch.cat(each) for each in zip(*batches, strict=True))
        assert result.eval_loss == pytest.approx(F.cross_entropy(model.eval()(x), y).item(), rel=1e-6)
        twin = copy.deepcopy(model)
        bn.recalibrate(twin, batches)
        assert result.recalibrated_loss == pytest.approx(F.cross_entropy(twin.eval()(x), y).item(), rel=1e-6)
    assert result.batches == BATCHES
    assert result.layers[0].log_variance.exp().median().item() == pytest.approx(9, rel=0.3)
    assert "in eval mode if recalibrated" in str(result)
    assert result.to_dict()["layers"][0]["layer"] == "1"


def test_uneven_batches_weigh_what_they_hold():
    batches = data(batches=2)
    uneven = [batches[0], (batches[1][0][:3], batches[1][1][:3])]
    model = trained(batches).eval()
    x, y = (torch.cat(each) for each in zip(*uneven, strict=True))
    with torch.no_grad():
        expected = F.cross_entropy(model(x), y).item()
    assert bn.compare_modes(model, uneven, F.cross_entropy).eval_loss == pytest.approx(expected, rel=1e-6)


def test_what_cannot_be_compared():
    model = trained(data())
    with pytest.raises(ValueError, match="iterator"):
        bn.compare_modes(model, iter(data()), F.cross_entropy)
    with pytest.raises(ValueError, match="at least one batch"):
        bn.compare_modes(model, [], F.cross_entropy)
    with pytest.raises(ValueError, match="at least one batch"):
        bn.diagnose(model, [])
    assert bn.diagnose(model, iter(data()), loss=F.cross_entropy) == []
