"""Networks of any shape, the same weights in every arm, and what each arm does to gamma and beta."""

from __future__ import annotations

from itertools import chain

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from batchnorm.lab import LabError, PairPerBatch, build
from batchnorm.lab.arms import BATCH_NORM, fix_affine
from batchnorm.lab.batches import Batches

SHAPES = [(1,), (7,), (1, 8, 8), (3, 5, 9), (2, 11), (1, 1, 1), (1, 3, 4, 5)]


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_any_shape_and_class_count(name, shape, norm):
    model = build(name, shape, classes=5, norm=norm)
    logits = model(torch.randn(6, *shape))
    assert logits.shape == (6, 5)
    F.cross_entropy(logits, torch.arange(6) % 5).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert sum(isinstance(m, BATCH_NORM) for m in model.modules()) == (3 if norm else 0)


def test_mlp_is_the_papers():
    kinds = [type(m).__name__ for m in build("mlp", (1, 28, 28), 10)]
    assert kinds == ["Flatten", *["Linear", "BatchNorm1d", "Sigmoid"] * 3, "Linear"]
    assert [tuple(m.weight.shape) for m in build("mlp", (1, 28, 28), 10) if isinstance(m, nn.Linear)] == [
        (100, 784),
        (100, 100),
        (100, 100),
        (10, 100),
    ]


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_weights_are_the_seeds_with_and_without_norm(name):
    before = torch.random.get_rng_state()
    one, other, third = (
        build(name, (1, 8, 8), 10, norm=norm, seed=s) for norm, s in [(True, 3), (False, 3), (True, 4)]
    )
    assert torch.equal(torch.random.get_rng_state(), before)
    weights = [
        [m.weight for m in model if hasattr(m, "weight") and m.weight.dim() > 1] for model in (one, other, third)
    ]
    assert all(torch.equal(a, b) for a, b in zip(weights[0], weights[1], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(weights[0], weights[2], strict=True))
    # Only the layers that no batch norm follows have a bias, and it begins at 0.
    assert [m.bias is None for m in one if hasattr(m, "weight") and m.weight.dim() > 1] == [True, True, True, False]
    assert all(not m.bias.any() for m in other if hasattr(m, "bias"))


def test_unknown_model():
    with pytest.raises(LabError, match="no model 'rnn'; there are mlp, cnn"):
        build("rnn", (3,), 2)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_a_step_moves_the_pair_of_its_batch_alone(optimizer):
    model = build("mlp", (4,), 3)
    pairs = PairPerBatch(model, batches=3)
    options = {"momentum": 0.9} if optimizer is torch.optim.SGD else {}
    moving = optimizer([p for m in (model, pairs) for p in m.parameters() if p.requires_grad], lr=0.1, **options)
    for batch in (0, 2, 2):  # 0 gathers momentum, which must not move it while 2 is trained
        before = {name: p.detach().clone() for name, p in pairs.named_parameters()}
        pairs.select(batch)
        moving.zero_grad()
        F.cross_entropy(model(torch.randn(8, 4)), torch.arange(8) % 3).backward()
        moving.step()
        moved = {name for name, p in pairs.named_parameters() if not torch.equal(p, before[name])}
        assert moved == {f"{side}.{layer}.{batch}" for side in ("gamma", "beta") for layer in range(3)}


def test_pairs_are_what_the_layer_computes_with():
    model = nn.Sequential(nn.BatchNorm1d(2)).double()
    pairs = PairPerBatch(model, batches=2)
    with torch.no_grad():
        pairs.gamma[0][0].copy_(torch.tensor([2.0, 3.0]))
        pairs.gamma[0][1].copy_(torch.tensor([4.0, 9.0]))
        pairs.beta[0][1].copy_(torch.tensor([-1.0, 1.0]))
    x = torch.randn(5, 2, dtype=torch.float64)
    normed = F.batch_norm(x, None, None, training=True)
    expected = {
        0: normed * torch.tensor([2.0, 3.0]),
        1: normed * torch.tensor([4.0, 9.0]) + torch.tensor([-1.0, 1.0]),
    }
    for batch, y in expected.items():
        pairs.select(batch)
        torch.testing.assert_close(model(x), y)
    pairs.select_average()
    torch.testing.assert_close(model(x), normed * torch.tensor([3.0, 6.0]) + torch.tensor([-0.5, 0.5]))
    # Deviations over the two pairs: gamma 1 and 3, beta 0.5 and 0.5.
    assert pairs.spread() == {"gamma_std": 2.0, "beta_std": 0.5}


def test_fixed_never_moves():
    model = build("cnn", (1, 4, 4), 3)
    fix_affine(model)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        F.cross_entropy(model(torch.randn(6, 1, 4, 4)), torch.arange(6) % 3).backward()
        optimizer.step()
    layers = [m for m in model.modules() if isinstance(m, BATCH_NORM)]
    assert len(layers) == 3
    assert all((m.weight == 1).all() and (m.bias == 0).all() for m in layers)


def epochs(batches: Batches, count: int) -> list[list[list[int]]]:
    return [[samples.tolist() for _, samples in batches.draw_epoch()] for _ in range(count)]


def test_batches_are_reshuffled_every_epoch_and_the_same_for_a_seed():
    first, second = (epochs(Batches(100, 7, seed=5, fixed=False), 3) for _ in range(2))
    assert first == second != epochs(Batches(100, 7, seed=6, fixed=False), 3)
    for epoch in first:
        assert sorted(chain.from_iterable(epoch)) == list(range(100))
    assert first[0] != first[1]
    assert {frozenset(batch) for batch in first[0]} != {frozenset(batch) for batch in first[1]}


def test_fixed_batches_keep_their_samples_and_change_their_order():
    batches = Batches(100, 7, seed=5, fixed=True)
    drawn = [batches.draw_epoch() for _ in range(3)]
    orders = [[number for number, _ in epoch] for epoch in drawn]
    assert orders[0] != orders[1] != orders[2]
    for epoch in drawn:
        by_number = [samples.tolist() for _, samples in sorted(epoch, key=lambda pair: pair[0])]
        # The cut is the one that the other arms have in their first epoch.
        assert by_number == epochs(Batches(100, 7, seed=5, fixed=False), 1)[0]


@pytest.mark.parametrize(
    ("samples", "size", "sizes"), [(9, 4, [4, 5]), (10, 4, [4, 4, 2]), (3, 60, [3]), (5, 2, [2, 3])]
)
def test_no_batch_of_one_and_no_sample_lost(samples, size, sizes):
    assert [len(batch) for batch in Batches(samples, size, 0, fixed=False).first] == sizes
