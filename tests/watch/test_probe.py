"""probe(): what several batches measure at the same weights, and a model that is left as it was."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import batchnorm as bn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(1, 4, 3)
        self.a = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.b = nn.BatchNorm1d(4)
        self.frozen = nn.BatchNorm1d(4).eval()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x, scale=1.0):
        self.calls += 1
        x = self.a(self.conv(x * scale)).relu().mean((2, 3))
        return self.frozen(self.b(self.drop(x)))


def images(n, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(6, 1, 5, 5, generator=generator) for _ in range(n)]


def state(model):
    flags = [module.training for module in model.modules()]
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    return copy.deepcopy(model.state_dict()), flags, gradients, torch.get_rng_state()


def unchanged(before, after):
    assert before[1] == after[1]
    assert torch.equal(before[3], after[3])
    assert all(torch.equal(value, after[0][name]) for name, value in before[0].items())
    for a, b in zip(before[2], after[2], strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


@pytest.mark.parametrize("training", [True, False])
def test_values_and_no_trace(tmp_path, training):
    model = Net()
    model(images(1)[0]).sum().backward()
    model.train(training)
    model.frozen.eval()
    buffer = model.a.running_mean
    before = state(model)
    with bn.watch(model, tmp_path) as w:
        w.probe([(x, "label") for x in images(3)])
        w.probe([{"x": x, "scale": 2.0} for x in images(2)])
        assert w.step == 0
    unchanged(before, state(model))
    assert model.a.running_mean is buffer
    run = bn.open_run(tmp_path)
    steps, mean = run.probes("a", "batch_mean")
    _, variance = run.probes("a", "batch_var")
    assert steps.tolist() == [0, 0]
    assert mean.shape == (2, 3, 4)
    assert np.isnan(mean[1, 2]).all()
    for row, scale in ((0, 1.0), (1, 2.0)):
        with torch.no_grad():
            seen = [model.conv(x * scale).double().transpose(0, 1).flatten(1) for x in images(3 - row)]
        for k, x in enumerate(seen):
            # The convolution's own rounding, a few ulp of numbers up to 8.
            np.testing.assert_allclose(mean[row, k], x.mean(1), rtol=2**-20, atol=2**-20)
            np.testing.assert_allclose(variance[row, k], x.var(1, correction=0), rtol=2**-19)
    assert len(run.steps) == 0
    # A layer that its owner keeps in eval mode measures nothing, unless the whole model was put there.
    assert np.isnan(run.probes("frozen", "batch_mean")[1]).all() == training


def test_between_forward_and_backward(tmp_path):
    model = Net()
    with bn.watch(model, tmp_path) as w:
        loss = model(images(1)[0]).square().sum()
        w.probe(images(2))
        loss.backward()
    assert bn.open_run(tmp_path).forwards("a").tolist() == [1]


def test_a_failing_batch_leaves_the_model_as_it_was(tmp_path):
    model = Net()
    before = state(model)
    with bn.watch(model, tmp_path) as w:
        with pytest.raises(RuntimeError):
            w.probe([images(1)[0], torch.zeros(2, 3)])
        with pytest.raises(ValueError, match="at least one batch"):
            w.probe([])
        unchanged(before, state(model))
        w.probe(images(1), call=lambda m, x: m(x, scale=0.5))
    run = bn.open_run(tmp_path)
    assert run.probes("a", "batch_mean")[1].shape == (1, 1, 4)
    assert sum(len(m._forward_hooks) for m in model.modules()) == 0


def test_layers_shared_within_the_model_are_pooled(tmp_path):
    layer = nn.BatchNorm1d(3)
    model = nn.Sequential(layer, nn.Linear(3, 3), layer)
    x = torch.randn(16, 3) * 2 + 5
    with bn.watch(model, tmp_path) as w:
        w.probe([x])
    seen = torch.cat([x, model[1](nn.BatchNorm1d(3)(x)).detach()]).double()
    run = bn.open_run(tmp_path)
    np.testing.assert_allclose(run.probes("0", "batch_mean")[1][0, 0], seen.mean(0), rtol=2**-20, atol=2**-20)
    np.testing.assert_allclose(run.probes("0", "batch_var")[1][0, 0], seen.var(0, correction=0), rtol=2**-19)
