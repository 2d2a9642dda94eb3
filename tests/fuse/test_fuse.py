"""convert(fuse=True): the same numbers, and a Sequential that can still be changed, sliced, hooked, copied."""

import copy
import pickle

import pytest
import torch
from cases import make
from compare import assert_close
from networks import InvertedResidual
from torch import nn

import batchnorm as bn
from batchnorm.nn import FusedSequential
from batchnorm.nn.layer import BatchNormLayer


def small_mobilenet():
    """Three inverted residuals."""
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6()),
        *(InvertedResidual(8, 8, 1, 1), InvertedResidual(8, 12, 2, 6), InvertedResidual(12, 12, 1, 6)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5)),
    )


def mlp(activation):
    return nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), activation, nn.Linear(4, 3), nn.BatchNorm1d(3))


def fused_calls(monkeypatch):
    """Counts the calls of batch norms that bring an activation."""
    calls = []
    forward = BatchNormLayer.forward
    monkeypatch.setattr(
        BatchNormLayer, "forward", lambda *a, **k: calls.append(k.get("activation") is not None) or forward(*a, **k)
    )
    return calls


@pytest.mark.parametrize(
    ("build", "shape", "expected"),
    [
        (small_mobilenet, (4, 3, 16, 16), 6),
        (lambda: mlp(nn.LeakyReLU(0.3)), (8, 6), 1),
        (lambda: mlp(nn.GELU("tanh")), (8, 6), 1),
        (lambda: mlp(nn.Softplus()), (8, 6), 0),
    ],
)
def test_values_gradients_and_state_are_those_of_the_model_before(build, shape, expected, monkeypatch):
    torchs = build()
    exact = copy.deepcopy(torchs).double()
    fused = bn.convert(copy.deepcopy(torchs), fuse=True)
    assert list(fused.state_dict()) == list(torchs.state_dict())
    calls = fused_calls(monkeypatch)
    for training in (True, False):
        x = make(shape)
        results = []
        for model in (torchs, fused, exact):
            model.train(training).zero_grad()
            t = x.to(next(model.parameters()).dtype, copy=True).requires_grad_()
            y = model(t)
            y.square().sum().backward()
            results.append([y, t.grad, *(p.grad for p in model.parameters()), *model.buffers()])
        for a, b, c in zip(*results, strict=True):
            if b.is_floating_point():
                assert_close(b, c, peer=a, ulps=600)  # gradients add up a term for each of up to 600 positions
            else:
                assert torch.equal(a, b)
    assert sum(calls) == 2 * expected


def test_it_can_be_changed_sliced_and_copied_like_any_sequential():
    model = bn.convert(mlp(nn.ReLU()), fuse=True).eval()
    x = make((8, 6))
    hidden = model[:3](x)
    assert hidden.min() >= 0
    assert torch.equal(model[:2](x).relu(), hidden)
    assert torch.equal(model[3:](hidden), model(x))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x))
    model.append(nn.Sigmoid())
    assert torch.equal(model(x), model[:5](x).sigmoid())
    model[2] = nn.Tanh()
    # torch's tanh is another polynomial than the fused one
    torch.testing.assert_close(model[:3](x), model[:2](x).tanh(), rtol=1e-6, atol=1e-6)
    with pytest.warns(UserWarning, match="nothing to convert"):
        assert nn.Sequential().append(nn.ReLU())(x).equal(bn.convert(nn.Sequential(nn.ReLU()), fuse=True)(x))
    with pytest.warns(UserWarning, match="nothing to convert"):
        assert bn.convert(nn.Sequential(), fuse=True)(x) is x
    del model[2]
    assert torch.equal(model[:3](x), model[2](model[:2](x)))


def test_hooks_see_what_they_would_have_seen():
    seen = []
    model = bn.convert(mlp(nn.ReLU()), fuse=True)
    x = make((8, 6))
    model[1].register_forward_hook(lambda m, i, y: seen.append(y.min().item() < 0))
    model(x)
    model[1]._forward_hooks.clear()
    model[2].register_forward_hook(lambda m, i, y: seen.append(i[0].min().item() < 0))
    model(x)
    assert seen == [True, True]


def test_revert_gives_the_model_back():
    class Mine(nn.Sequential):
        pass

    model = nn.Sequential(Mine(nn.BatchNorm1d(6), nn.ReLU()), nn.Sequential(nn.BatchNorm1d(6), nn.ReLU()))
    before = [type(m) for m in model.modules()]
    bn.convert(model, fuse=True)
    assert type(model) is type(model[1]) is FusedSequential
    assert isinstance(model[0], Mine)
    assert type(model[0]) is not Mine
    bn.revert(model)
    assert [type(m) for m in model.modules()] == before


@pytest.mark.processes
@pytest.mark.slow
def test_it_compiles_without_a_graph_break():
    model = bn.convert(mlp(nn.SiLU()), fuse=True)
    x = make((8, 6))
    expected = copy.deepcopy(model)(x)
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), expected, rtol=1e-5, atol=1e-5)
