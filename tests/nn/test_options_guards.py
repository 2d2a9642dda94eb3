"""nonfinite= and singleton=: batches that would spoil the running statistics, or that have none."""

import copy
import pickle

import pytest
import torch
from cases import make
from stepping import assert_step, randomize
from torch import nn

import batchnorm as bn
from batchnorm.ops import cpu

BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def poisoned(shape, value):
    x = make(shape)
    x[(0, 1, *[0] * (len(shape) - 2))] = value
    return x


def state(layer):
    return [getattr(layer, name).clone() for name in BUFFERS]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("training_shape", [(8, 3), (4, 3, 5, 6)])
def test_propagate_is_what_torch_does(training_shape, value):
    cls = (nn.BatchNorm1d, bn.BatchNorm1d) if len(training_shape) == 2 else (nn.BatchNorm2d, bn.BatchNorm2d)
    theirs, ours = (c(3) for c in cls)
    x = poisoned(training_shape, value)
    theirs(x), ours(x)
    for name in BUFFERS:
        a, b = getattr(theirs, name), getattr(ours, name)
        # torch's mean of a batch with an infinity is infinite or NaN, by layout; what counts is which are not finite.
        assert torch.equal(a.isfinite(), b.isfinite())
        torch.testing.assert_close(b[[0, 2]] if b.dim() else b, a[[0, 2]] if a.dim() else a, rtol=1e-5, atol=1e-6)
    assert not ours.running_mean[1].isfinite()


@pytest.mark.parametrize(
    "options", [{}, {"virtual_batch_size": 3}, {"renorm": bn.Renorm()}, {"momentum": None}], ids=str
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("compiled", [True, False])
def test_skip_keeps_the_channel_and_tracks_the_others(compiled, value, options, monkeypatch):
    if not compiled:
        monkeypatch.setattr(cpu, "COMPILED", False)
    layer = randomize(bn.BatchNorm1d(3, nonfinite="skip", **options))
    twin = copy.deepcopy(layer)
    x = poisoned((8, 3), value)
    before = layer.running_mean[1].clone(), layer.running_var[1].clone()
    y = layer(x)
    twin(x.nan_to_num(posinf=0.0))
    assert y[:, 0].isfinite().all()
    assert y[:, 1].isnan().any()
    assert (layer.running_mean[1], layer.running_var[1]) == before
    for name in BUFFERS[:2]:
        assert torch.equal(getattr(layer, name)[[0, 2]], getattr(twin, name)[[0, 2]])
        assert not torch.equal(getattr(layer, name)[0], before[0])
    assert (layer.skipped, twin.skipped) == (1, 0)
    assert (int(layer.num_batches_tracked), int(twin.num_batches_tracked)) == (1, 1)


def test_skipped_batches_are_counted_shown_and_kept():
    layer = bn.BatchNorm1d(3, nonfinite="skip")
    for value in (float("nan"), 1.0, float("inf")):
        layer(poisoned((8, 3), value))
    assert layer.skipped == 2
    assert "nonfinite=skip, skipped=2" in repr(layer)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.skipped == 2
    assert list(layer.state_dict()) == list(nn.BatchNorm1d(3).state_dict())
    with bn.no_update(layer):
        layer(poisoned((8, 3), float("nan")))
    layer.eval()(poisoned((8, 3), float("nan")))
    assert layer.skipped == 2
    layer.reset_running_stats()
    assert layer.skipped == 0


@pytest.mark.slow
def test_skipped_batches_are_counted_in_a_compiled_graph_too():
    layer = bn.BatchNorm1d(3, nonfinite="skip")
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for value in (1.0, float("nan"), 2.0, float("nan")):
        compiled(poisoned((8, 3), value))
    assert layer.skipped == 2
    assert layer.running_mean.isfinite().all()


@pytest.mark.parametrize(
    "options", [{}, {"virtual_batch_size": 3}, {"renorm": bn.Renorm()}, {"momentum": None}], ids=str
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_raise_says_which_channels_before_anything_has_moved(value, options):
    layer = randomize(bn.BatchNorm1d(3, nonfinite="raise", **options))
    layer(make((8, 3)))
    before = state(layer)
    with pytest.raises(RuntimeError, match=r"1 of 3 channels \(the first: \[1\]\).*nonfinite=\"skip\""):
        layer(poisoned((8, 3), value))
    assert all(torch.equal(a, b) for a, b in zip(before, state(layer), strict=True))
    layer(make((8, 3)))
    assert int(layer.num_batches_tracked) == 2


@pytest.mark.parametrize("nonfinite", ["skip", "raise"])
def test_finite_batches_and_what_lies_under_a_mask_are_no_concern(nonfinite):
    layer = randomize(bn.BatchNorm1d(3, nonfinite=nonfinite))
    assert_step(layer, make((8, 3)))
    mask = torch.ones(8, dtype=torch.bool)
    mask[0] = False
    assert_step(layer, poisoned((8, 3), float("nan")), mask=mask)
    assert layer.skipped == 0


@pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1), (1, 3, 1, 1), (1, 3, 1, 1, 1)])
@pytest.mark.parametrize("options", [{}, {"virtual_batch_size": 4}, {"channel_dim": -1}], ids=str)
def test_one_value_a_channel_raises_torchs_error_with_name_shape_and_cures(shape, options):
    kind = f"BatchNorm{max(len(shape) - 2, 1)}d"
    cls, torchs = getattr(bn, kind), getattr(nn, kind)
    x = make(shape)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        torchs(3)(x)
    layer = cls(3, **options)
    x = x.movedim(1, layer.channel_dim)
    expected = r"Expected more than 1 value per channel when training, got input size .*drop_last.*\"running\".*eval"
    with pytest.raises(ValueError, match=expected) as raised:
        layer(x)
    assert str(tuple(x.shape)) in str(raised.value).replace("torch.Size([", "(").replace("])", ")")
    assert int(layer.num_batches_tracked) == 0
    layer.eval()(x)


@pytest.mark.parametrize(
    "options", [{}, {"virtual_batch_size": 4}, {"renorm": bn.Renorm()}, {"channel_dim": -1}], ids=str
)
def test_running_normalizes_one_value_as_eval_and_moves_nothing(options):
    layer = randomize(bn.BatchNorm1d(3, singleton="running", activation="tanh", **options))
    before = state(layer)
    x = make((1, 3)).requires_grad_()
    y = layer(x)
    y.sum().backward()
    twin = copy.deepcopy(layer).eval()
    t = x.detach().requires_grad_()
    expected = twin(t)
    expected.sum().backward()
    assert torch.equal(y, expected)
    assert torch.equal(x.grad, t.grad)
    assert all(torch.equal(a, b) for a, b in zip(before, state(layer), strict=True))
    assert layer.measured is None
    layer(make((8, 3)))
    assert int(layer.num_batches_tracked) == 1


@pytest.mark.slow
def test_running_compiles_without_a_graph_break():
    layer = randomize(bn.BatchNorm1d(3, singleton="running"))
    compiled, before = torch.compile(layer, fullgraph=True, backend="aot_eager"), state(layer)
    for items in (1, 2):
        x = make((items, 3))
        expected = copy.deepcopy(layer)(x)
        torch.testing.assert_close(compiled(x), expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(layer.running_mean, before[0]) == (items == 1)


@pytest.mark.parametrize("options", [{}, {"nonfinite": "raise"}], ids=str)
def test_errors_name_the_layer_in_the_model_that_called_it(options):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(3, 3), bn.BatchNorm1d(3, **options))

        def forward(self, x):
            return self.inner(x)

    model = nn.Sequential(Block(), Block())
    x = torch.full((4, 3), torch.nan) if options else torch.zeros(1, 3)
    with pytest.raises((RuntimeError, ValueError), match=r"^0\.inner\.1: "):
        model(x)
    with pytest.raises((RuntimeError, ValueError), match=r"^(Expected|batch norm: )"):
        model[0].inner[1](x)


def test_running_trains_through_a_last_batch_of_one():
    model = nn.Sequential(nn.Linear(4, 3), bn.BatchNorm1d(3, singleton="running"), nn.ReLU(), nn.Linear(3, 1))
    for batch in make((9, 4)).split(4):
        model(batch).sum().backward()
    assert int(model[1].num_batches_tracked) == 2
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_virtual_batches_of_one_value_are_named():
    with pytest.raises(
        ValueError, match=r"size torch\.Size\(\[8, 3\]\) in virtual batches of 1: .* larger virtual_batch_size"
    ):
        bn.BatchNorm1d(3, virtual_batch_size=1)(make((8, 3)))
    with pytest.raises(ValueError, match=r"when training, got input size .*larger batch") as raised:
        bn.BatchNorm1d(3, virtual_batch_size=4)(make((1, 3)))
    assert "virtual" not in str(raised.value)


@pytest.mark.parametrize("channel_dim", [1, -1])
@pytest.mark.parametrize(
    ("residual", "error", "message"),
    [
        (torch.zeros(3, 4, 4), RuntimeError, r"residual must have the input's shape, \(2, 4, 4\).*got \(3, 4, 4\)"),
        (1.0, TypeError, "residual must be a tensor.*got float"),
    ],
)
def test_a_residual_that_cannot_be_added_is_named_and_nothing_moves(residual, error, message, channel_dim):
    layer = bn.BatchNorm1d(4, channel_dim=channel_dim)
    with pytest.raises(error, match=message):
        layer(make((2, 4, 4)), residual)
    assert layer.running_mean.eq(0).all()
    assert int(layer.num_batches_tracked) == 0
