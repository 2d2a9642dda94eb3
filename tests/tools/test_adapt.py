"""adapt(): a small net on digits that got brighter, paler, noisier; against formulas in float64; undone."""

import copy
import json

import pytest
import torch
from compare import assert_close
from leftovers import everything
from sklearn.datasets import load_digits
from torch import nn

import batchnorm as bn
from batchnorm.tools import adapt as module

BOTH = [nn.BatchNorm2d, bn.BatchNorm2d]
METHODS = ["statistics", "blend", "entropy"]
SHIFTS = {"brighter": lambda x: x * 0.5 + 0.8, "paler": lambda x: (x - 0.3) * 0.2 + 0.3}


@pytest.fixture(scope="module")
def digits():
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(labels)


@pytest.fixture(scope="module")
def trained(digits):
    """A net that reads digits as they are, about 92 % right, on both kinds of layers in turn."""
    torch.manual_seed(1)
    first = nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)
    second = nn.Conv2d(16, 32, 3, padding=1), bn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2)
    model = nn.Sequential(*first, *second, nn.Linear(512, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(80):
        batch = torch.randint(0, 1200, (64,))
        nn.functional.cross_entropy(model(digits[0][batch]), digits[1][batch]).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return model


def accuracy(model, x, target):
    modes = [(m, m.training) for m in model.modules()]
    with torch.no_grad():
        right = (model.eval()(x).argmax(1) == target).float().mean().item()
    for m, mode in modes:
        m.training = mode
    return right


def small(cls=nn.BatchNorm2d):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 1), cls(3), nn.Dropout(), nn.Flatten(), nn.Linear(12, 4))


def state(model):
    return copy.deepcopy(model.state_dict())


def assert_same_state(model, before):
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("shift", SHIFTS)
def test_on_shifted_digits_each_method_reads_far_better_and_can_be_undone(trained, digits, shift):
    x, target = SHIFTS[shift](digits[0][1200:]), digits[1][1200:]
    before, kept = accuracy(trained, x, target), state(trained)
    found = {}
    for method, options in (("statistics", {}), ("blend", {}), ("entropy", {"lr": 3e-3, "epochs": 3})):
        adaptation = bn.adapt(trained, x.split(64), method, **options)
        found[method] = accuracy(trained, x, target)
        if method == "entropy":
            assert sum(adaptation.entropy[-10:]) < 0.8 * sum(adaptation.entropy[:10])
        adaptation.undo()
        assert_same_state(trained, kept)
        assert accuracy(trained, x, target) == before
    # Measured over three seeds: from 0.10 to 0.49 before, and from 0.84 to 0.94 after.
    assert before < 0.6
    assert min(found.values()) > before + 0.25
    assert found["entropy"] >= found["statistics"] - 0.01


def test_gamma_and_beta_are_put_back_when_the_predictions_collapse(monkeypatch):
    """Of one batch again and again, the entropy falls; then gamma and beta are the first ones, and it falls again."""
    x = torch.randn(20, 2, 2, 2) * 3

    def adapted():
        model = small()
        with torch.no_grad():
            model[4].weight.mul_(20)
        return bn.adapt(model, [x], "entropy", lr=0.3, epochs=60)

    guarded = adapted()
    entropy = guarded.entropy
    first_again = [i for i in range(1, 60) if entropy[i] == pytest.approx(entropy[0], rel=1e-5)]
    period = first_again[0]
    assert min(entropy[:period]) < entropy[0] / 2
    for start in first_again:
        assert entropy[start : start + period] == pytest.approx(
            entropy[: len(entropy[start : start + period])], rel=1e-3
        )
    assert guarded.resets == 60 // period
    monkeypatch.setattr(module, "_COLLAPSED", 0.0)
    unguarded = adapted()
    assert unguarded.resets == 0
    assert unguarded.entropy[:period] == pytest.approx(entropy[:period], rel=1e-3)
    assert unguarded.entropy[-1] < min(entropy)


@pytest.mark.parametrize("cls", BOTH)
@pytest.mark.parametrize("exact", [False, True])
def test_statistics_are_those_of_the_target_and_blend_weighs_them_by_samples(cls, exact):
    x = torch.randn(30, 2, 2, 2) * 3 + 5
    model, blended = small(cls), small(cls)
    for m in (model, blended):
        m[1].running_mean.copy_(torch.tensor([1.0, 2.0, 3.0]))
        m[1].running_var.fill_(4.0)
    before = state(blended)
    bn.adapt(model, x.split(13), exact=exact)
    values = model[0](x).detach().double().movedim(1, -1).flatten(0, -2)
    scale = values.square().max().item()
    assert_close(model[1].running_mean, values.mean(0), scale=scale)
    assert_close(model[1].running_var, values.var(0), scale=scale)
    bn.adapt(blended, x.split(13), "blend", prior=10, exact=exact)  # 10 / 40 of the source, 30 / 40 of the target
    assert_close(blended[1].running_mean, before["1.running_mean"].double() / 4 + 0.75 * values.mean(0), scale=scale)
    assert_close(blended[1].running_var, before["1.running_var"].double() / 4 + 0.75 * values.var(0), scale=scale)


@pytest.mark.parametrize("cls", BOTH)
def test_a_step_is_adams_on_the_entropy_of_what_is_certain(cls):
    """One batch: gamma and beta as by autograd and torch's Adam in float64 on a model in train mode without dropout."""
    model, x = small(cls), torch.randn(20, 2, 2, 2) * 3
    with torch.no_grad():
        model[4].weight.mul_(20)  # certain predictions, some of them
    exact = copy.deepcopy(model).double().train()
    exact[2].p = 0.0
    probability = exact(x.double()).softmax(1)
    each = -(probability * probability.log()).sum(1)
    keep = each < 0.4 * torch.tensor(4.0).log()
    assert 0 < keep.sum() < 20
    optimizer = torch.optim.Adam(exact[1].parameters(), lr=0.01)
    each[keep].mean().backward()
    optimizer.step()
    adaptation = bn.adapt(model, [x], "entropy", lr=0.01)
    # The first step of Adam is lr * sign(gradient), nearly.
    torch.testing.assert_close(model[1].weight.double(), exact[1].weight, atol=1e-6, rtol=0)
    torch.testing.assert_close(model[1].bias.double(), exact[1].bias, atol=1e-6, rtol=0)
    assert adaptation.entropy == [pytest.approx(each.mean().item(), rel=1e-4)]


@pytest.mark.parametrize("method", METHODS)
def test_nothing_but_batch_norm_changes(method):
    model = small()
    model[0].weight.requires_grad_(False)
    model[1].weight.grad = torch.ones(3)
    model[4].bias.grad = torch.ones(4)
    frozen = bn.freeze(nn.BatchNorm2d(2))
    learns_not = bn.freeze(nn.BatchNorm2d(2), stats=False, affine=True)
    model = nn.Sequential(frozen, learns_not, *model)
    with torch.no_grad():
        model[6].weight.mul_(20)
    before, kept, gradient = everything(model), state(model), model[3].weight.grad
    adaptation = bn.adapt(model, list(torch.randn(3, 20, 2, 2, 2) + 1), method)
    assert model[3].weight.grad is gradient
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, kept[name])}
    statistics = {"running_mean", "running_var", "num_batches_tracked"}
    learned = {"3.weight", "3.bias"} if method == "entropy" else set()
    assert changed == learned | {f"{i}.{name}" for i in (1, 3) for name in statistics}
    assert [d.state for d in adaptation.layers] == ["frozen", "recalibrated", "recalibrated"]
    json.dumps(adaptation.to_dict(), allow_nan=False)
    adaptation.undo()
    assert_same_state(model, kept)
    assert everything(model) == before
    assert model.state_dict().keys() == kept.keys()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("cls", BOTH)
def test_if_anything_raises_all_is_as_it_was(method, cls):
    model = small(cls)
    with torch.no_grad():
        model[4].weight.mul_(20)
    before, kept, x = everything(model), state(model), torch.randn(20, 2, 2, 2)
    for wrong in (torch.randn(4, 3, 2, 2), torch.full((4, 2, 2, 2), torch.nan)):
        with pytest.raises(RuntimeError):
            bn.adapt(model, [x, wrong], method)
        assert everything(model) == before
        assert_same_state(model, kept)


@pytest.mark.parametrize("method", ["statistics", "blend", "entropy"])
@pytest.mark.parametrize("cls", [nn.BatchNorm1d, bn.BatchNorm1d])
def test_a_last_batch_of_one(cls, method):
    model, x = nn.Sequential(cls(4), nn.Linear(4, 3)).eval(), torch.randn(21, 4) * 2 + 5
    before = model[0].running_mean.clone()
    adaptation = bn.adapt(model, x.split(10), method, prior=21.0)
    assert len(adaptation.entropy) == (3 if method == "entropy" else 0)
    expected = x.double().mean(0)
    assert_close(model[0].running_mean, (expected + before) / 2 if method == "blend" else expected, scale=10.0)


def test_what_cannot_be_asked_for():
    x = torch.randn(8, 2, 2, 2)
    for model, options, said in (
        (small(), {"method": "tent"}, "method must be"),
        (small(), {"prior": -1}, "prior >= 0"),
        (small(), {"method": "entropy", "batches": iter([x])}, "iterator"),
        (nn.Conv2d(2, 3, 1), {"method": "entropy"}, "unfreeze the model"),
        (small(), {"method": "entropy", "call": lambda model, x: {"logits": model(x)}}, "got dict; pass call="),
        (small(), {"method": "entropy", "call": lambda model, x: model(x)[:, 0]}, r"got \(8,\)"),
        (small(), {"batches": []}, "at least one batch"),
    ):
        kept = state(model)
        with pytest.raises(ValueError, match=said):
            bn.adapt(model, **{"batches": [x], **options})
        assert_same_state(model, kept)


def test_a_model_without_batch_norm_is_left_alone_and_named():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    with pytest.warns(UserWarning, match="no batch norm to recalibrate; it has Linear, ReLU") as caught:
        assert bn.adapt(model, [torch.randn(4, 3)]).layers == []
    assert [each.filename for each in caught] == [__file__]
