"""renorm=Renorm(...): against the paper's formula in float64, finite differences of it, and Keras."""

import copy

import pytest
import torch
from cases import laid_out, make
from compare import assert_close
from stepping import assert_step, randomize
from torch import nn

import batchnorm as bn
from batchnorm.moments import Moments, broadcast_mask, per_channel

LIMITS = [(1.0, 0.0), (1.2, 0.1), (3.0, 5.0), (float("inf"), float("inf"))]


def formula(x, layer, r_max, d_max, mask=None):
    """(y, r, d) of Algorithm 1, float64, r and d constants."""
    shape = per_channel(x)
    moments = Moments.measure(x, mask)
    mean, sigma = moments.mean, (moments.variance() + layer.eps).sqrt()
    running_sigma = (layer.running_var.double() + layer.eps).sqrt()
    r = (sigma / running_sigma).clamp(1 / r_max, r_max).detach()
    d = ((mean - layer.running_mean.double()) / running_sigma).clamp(-d_max, d_max).detach()
    xhat = (x.double() - mean.view(shape)) / sigma.view(shape) * r.view(shape) + d.view(shape)
    y = xhat if layer.weight is None else xhat * layer.weight.double().view(shape) + layer.bias.double().view(shape)
    return y if mask is None else torch.where(broadcast_mask(mask, x), y, 0.0), r, d


@pytest.mark.parametrize("limits", LIMITS, ids=str)
@pytest.mark.parametrize(
    ("shape", "options", "masked"),
    [
        ((16, 3), {}, False),
        ((6, 3, 5), {}, True),
        ((4, 3, 5, 6), {"affine": False}, False),
        ((4, 3, 5, 6), {"unbiased": False, "momentum": 0.3}, True),
    ],
    ids=str,
)
def test_values_gradients_and_tracking_are_the_formulas(shape, options, masked, limits):
    cls = bn.BatchNorm2d if len(shape) == 4 else bn.BatchNorm1d
    layer = randomize(cls(3, renorm=bn.Renorm(*limits), **options))
    exact = copy.deepcopy(layer).double()
    mask = torch.rand(shape[:1] + shape[2:]) < 0.7 if masked else None
    x, dy = make(shape), make(shape)
    seen = x if mask is None else torch.where(mask.unsqueeze(1), x, torch.nan)
    ours, theirs = seen.clone().requires_grad_(), x.double().requires_grad_()
    expected, r, d = formula(theirs, exact, *limits, mask)
    y = layer(ours, mask=mask)
    y.backward(dy)
    expected.backward(dy.double())
    # gamma * r and gamma * d + beta are rounded once each, and d may be large
    size = max(1.0, r.max().item() + d.abs().max().item()) * 2
    assert_close(y, expected, ulps=4 * size)
    assert_close(ours.grad, theirs.grad, ulps=4 * size)
    terms = max(1.0, dy.double().abs().sum().item()) * size
    for a, b in zip(layer.parameters(), exact.parameters(), strict=True):
        assert_close(a.grad, b.grad, scale=terms)
    moments, m = Moments.measure(x, mask), layer.momentum
    assert_close(layer.running_mean, (1 - m) * exact.running_mean + m * moments.mean)
    assert_close(layer.running_var, (1 - m) * exact.running_var + m * moments.variance(layer.unbiased))


def test_the_gradient_is_that_of_finite_differences_with_r_and_d_held():
    layer = randomize(bn.BatchNorm1d(2, renorm=bn.Renorm(1.1, 0.2), dtype=torch.float64))
    x, dy = make((5, 2), torch.float64), make((5, 2), torch.float64)
    _, r, d = formula(x, layer, 1.1, 0.2)
    sigma = (layer.running_var + layer.eps).sqrt()
    assert not torch.allclose(r * sigma, (x.var(0, unbiased=False) + layer.eps).sqrt())  # the limit holds somewhere

    def loss(t):
        xhat = (t - t.mean(0)) / (t.var(0, unbiased=False) + layer.eps).sqrt() * r + d
        return ((xhat * layer.weight + layer.bias) * dy).sum().item()

    step = 1e-5
    expected = torch.empty_like(x)
    for i in range(x.numel()):
        e = torch.zeros(x.numel(), dtype=torch.float64)
        e[i] = step
        e = e.view_as(x)
        expected.view(-1)[i] = (loss(x + e) - loss(x - e)) / (2 * step)
    t = x.clone().requires_grad_()
    layer(t).backward(dy)
    torch.testing.assert_close(t.grad, expected, rtol=0, atol=1e-8)  # step^2 and rounding / step, both 1e-10 of ~10


def test_limits_of_one_and_zero_are_batch_normalization():
    assert_step(randomize(bn.BatchNorm2d(3, renorm=bn.Renorm(1.0, 0.0), activation="relu")), make((4, 3, 5, 6)))


def test_without_limits_training_normalizes_as_eval_did_before():
    layer = randomize(bn.BatchNorm2d(3, renorm=bn.Renorm(float("inf"), float("inf"))))
    x = make((4, 3, 5, 6))
    expected = layer.eval()(x)
    assert_close(layer.train()(x), expected.double(), ulps=16)
    assert int(layer.num_batches_tracked) == 1


def test_a_schedule_is_asked_with_the_number_of_batches_before():
    asked = []

    def schedule(batches):
        asked.append(batches)
        return (1.0, 0.0) if batches < 2 else (3.0, 5.0)

    layer = bn.BatchNorm1d(3, renorm=bn.Renorm(schedule=schedule))
    for step in range(4):
        x, limits = make((8, 3), mean=3.0), (1.0, 0.0) if step < 2 else (3.0, 5.0)
        expected, *_ = formula(x, layer, *limits)
        assert_close(layer(x), expected, ulps=60)
    assert asked == [0, 1, 2, 3]
    layer.eval()(x)
    assert len(asked) == 4


@pytest.mark.parametrize("limits", [(0.9, 1.0), (float("nan"), 1.0), (2.0, -1.0)])
def test_limits_that_are_none_raise(limits):
    with pytest.raises(ValueError, match="r_max >= 1 and d_max >= 0"):
        bn.Renorm(*limits)
    layer = bn.BatchNorm1d(3, renorm=bn.Renorm(schedule=lambda n: limits))
    with pytest.raises(ValueError, match="r_max >= 1 and d_max >= 0"):
        layer(make((4, 3)))
    assert int(layer.num_batches_tracked) == 0


def test_inside_no_update_it_reads_the_running_statistics_and_leaves_them():
    layer = randomize(bn.BatchNorm1d(3, renorm=bn.Renorm()))
    x, before = make((8, 3)), layer.running_mean.clone()
    expected, *_ = formula(x, layer, 3.0, 5.0)
    with bn.no_update(layer):
        assert_close(layer(x), expected, ulps=60)
    assert torch.equal(layer.running_mean, before)


@pytest.mark.parametrize("layout", ["channels_last", "sliced"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes_layouts_activation_and_residual(dtype, layout):
    layer = randomize(bn.BatchNorm2d(3, renorm=bn.Renorm(2.0, 1.0), activation="tanh"))
    layer = layer.double() if dtype == torch.float64 else layer
    x, residual = (laid_out(make((4, 3, 5, 6), dtype), layout) for _ in range(2))
    expected = torch.tanh(formula(x, layer, 2.0, 1.0)[0] + residual.double())
    assert_close(layer(x, residual), expected)


def test_transforms_hold_r_and_d_too():
    layer = randomize(bn.BatchNorm1d(2, renorm=bn.Renorm(1.5, 0.5), dtype=torch.float64))
    x = make((5, 2), torch.float64)
    expected = torch.func.jacrev(lambda t: formula(t, layer, 1.5, 0.5)[0])(x)
    with bn.no_update(layer):  # transforms refuse to change what they were not given
        for transform in (torch.func.jacrev, torch.func.jacfwd):
            torch.testing.assert_close(transform(layer)(x), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_it_compiles_without_a_graph_break():
    layer = randomize(bn.BatchNorm1d(3, renorm=bn.Renorm(1.5, 0.5)))
    eager, compiled = copy.deepcopy(layer), torch.compile(layer, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        x = make((8, 3)).requires_grad_()
        y, expected = compiled(x), eager(x)
        torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)
        gradients = [torch.autograd.grad(t.square().sum(), x)[0] for t in (y, expected)]
        torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)
    for a, b in zip(layer.buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_it_trains_where_batches_are_of_one_class_and_eval_agrees():
    """What it is for: with batches of one class, batch normalization sees in training what eval never shows it."""
    torch.manual_seed(0)
    accuracies = {}
    for renorm in (None, bn.Renorm(3.0, 5.0)):
        model = nn.Sequential(nn.Linear(2, 16), bn.BatchNorm1d(16, renorm=renorm), nn.ReLU(), nn.Linear(16, 2))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        generator = torch.Generator().manual_seed(0)
        for step in range(300):
            target = torch.full((32,), step % 2)
            x = torch.randn(32, 2, generator=generator) + 4 * target[:, None] - 2
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), target).backward()
            optimizer.step()
        target = torch.arange(400) % 2
        x = torch.randn(400, 2, generator=generator) + 4 * target[:, None] - 2
        accuracies[renorm] = (model.eval()(x).argmax(1) == target).float().mean().item()
    assert accuracies[bn.Renorm(3.0, 5.0)] > 0.95 > accuracies[None] + 0.1
