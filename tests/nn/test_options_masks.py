"""mask= and lengths=: what is False counts nowhere, is 0 in y, has no gradient, and may be anything."""

import pytest
import torch
from cases import laid_out, make
from stepping import assert_step, randomize
from torch import nn
from torch._subclasses import FakeTensorMode

import batchnorm as bn

CLASSES = {2: bn.BatchNorm1d, 3: bn.BatchNorm1d, 4: bn.BatchNorm2d, 5: bn.BatchNorm3d}
SHAPES = [(16, 3), (6, 3, 5), (5, 3, 5, 6), (3, 3, 2, 3, 4)]
OPTIONS = [
    {},
    {"virtual_batch_size": 2},
    {"activation": "silu"},
    {"virtual_batch_size": 2, "activation": "relu", "unbiased": False},
    {"affine": False},
]


def hidden(x, mask):
    """x with NaN under the mask."""
    return torch.where(mask.expand(x.select(1, 0).shape).unsqueeze(1), x, torch.nan)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_statistics_values_gradients_and_tracking_with_nan_under_the_mask(shape, options, with_residual, training):
    layer = randomize(CLASSES[len(shape)](3, **options)).train(training)
    mask = torch.rand(shape[:1] + shape[2:]) < 0.6
    x, residual = hidden(make(shape), mask), hidden(make(shape), mask) if with_residual else None
    y = assert_step(layer, x, mask=mask, residual=residual)
    assert y.movedim(1, -1)[~mask].eq(0).all()
    assert int(layer.num_batches_tracked) == training
    if training:
        assert int(layer.measured.count) == int(mask.sum())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "sliced"])
@pytest.mark.parametrize("options", [{}, {"virtual_batch_size": 2, "activation": "relu"}], ids=str)
def test_dtypes_and_layouts(options, layout, dtype):
    mask = torch.rand(5, 5, 6) < 0.6
    layer = randomize(bn.BatchNorm2d(3, dtype=torch.float64 if dtype == torch.float64 else torch.float32, **options))
    assert_step(layer, laid_out(hidden(make((5, 3, 5, 6), dtype), mask), layout), mask=mask)


@pytest.mark.parametrize("mask_shape", [(4, 5, 6), (4, 1, 1), (1, 5, 6), (5, 6), (6,), ()])
def test_a_mask_broadcasts_from_the_right(mask_shape):
    mask = torch.rand(mask_shape) < 0.6
    mask.view(-1)[:1] = True
    assert_step(randomize(bn.BatchNorm2d(3)), hidden(make((4, 3, 5, 6)), mask), mask=mask)


@pytest.mark.parametrize("options", [{}, {"virtual_batch_size": 3}, {"renorm": bn.Renorm()}], ids=str)
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_a_batch_without_a_single_true_changes_no_statistic(kind, options):
    layer = randomize(bn.BatchNorm1d(3, **options))
    before = [b.clone() for b in (layer.running_mean, layer.running_var)]
    x = torch.full((4, 3, 6), torch.nan, dtype=kind, requires_grad=True)
    y = layer(x, mask=torch.zeros(4, 6, dtype=torch.bool))
    y.sum().backward()
    assert y.eq(0).all()
    assert all(t.grad.eq(0).all() for t in (x, layer.weight, layer.bias))
    assert all(torch.equal(a, b) for a, b in zip(before, (layer.running_mean, layer.running_var), strict=True))


def test_one_true_value_gives_beta_and_moves_the_mean_alone():
    """Its variance is 0 and the unbiased one does not exist. Whether a mask has more than one True only its device
    knows, so this does not raise, not even with singleton="raise"."""
    layer = randomize(bn.BatchNorm1d(2, singleton="raise", momentum=0.5))
    mean, var = layer.running_mean.clone(), layer.running_var.clone()
    x = torch.arange(6.0).view(1, 2, 3)
    y = layer(x, mask=torch.tensor([[False, True, False]]))
    assert torch.equal(y[0, :, 1], layer.bias)
    assert torch.equal(layer.running_mean, (mean + x[0, :, 1]) / 2)
    assert torch.equal(layer.running_var, var)


@pytest.mark.parametrize("channel_dim", [1, 2, -1])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_lengths_are_the_mask_of_the_first_so_many(channel_dim, dtype):
    lengths = torch.tensor([5, 0, 3, 1], dtype=dtype)
    mask = torch.tensor([[t < n for t in range(5)] for n in lengths])
    x = hidden(make((4, 3, 5)), mask).movedim(1, channel_dim)
    layer = randomize(bn.BatchNorm1d(3, channel_dim=channel_dim, activation="relu"))
    assert_step(layer, x, mask=mask, lengths=lengths)
    also = torch.rand(4, 5) < 0.7
    layer(x, mask=also, lengths=lengths)
    assert int(layer.measured.count) == int((mask & also).sum())


@pytest.mark.parametrize(
    ("x", "lengths", "message"),
    [
        (torch.zeros(4, 3), torch.ones(4).long(), "lengths need an input of sequences"),
        (torch.zeros(4, 3, 5), torch.ones(3).long(), "expected 4 integer lengths"),
        (torch.zeros(4, 3, 5), torch.ones(4), "expected 4 integer lengths"),
        (torch.zeros(4, 3, 5), torch.ones(4, 5).bool(), "expected 4 integer lengths"),
        (torch.zeros(4, 3, 5), torch.tensor([5, 6, 0, 1]), r"from 0 to 5 .* but got \[5, 6, 0, 1\]"),
        (torch.zeros(4, 3, 5), torch.tensor([5, -1, 0, 1]), "from 0 to 5"),
        (torch.zeros(4, 3, 5), [5, 4, 0, 1], r"pass torch.tensor\(lengths\)"),
    ],
)
def test_lengths_that_are_none_raise_and_change_nothing(x, lengths, message):
    layer = bn.BatchNorm1d(3)
    with pytest.raises(ValueError if isinstance(lengths, torch.Tensor) else TypeError, match=message):
        layer(x, lengths=lengths)
    assert int(layer.num_batches_tracked) == 0


def test_lengths_under_a_transform_are_not_looked_at():
    """What the check of their range would need is not there: vmap's tensors have no values, nor has a fake tensor."""
    layer, x, lengths = bn.BatchNorm1d(3).eval(), make((2, 4, 3, 5)), torch.tensor([[5, 1, 0, 2], [4, 4, 3, 5]])
    together = torch.vmap(lambda x, lengths: layer(x, lengths=lengths))(x, lengths)
    one_by_one = torch.stack([layer(t, lengths=n) for t, n in zip(x, lengths, strict=True)])
    torch.testing.assert_close(together, one_by_one, rtol=1e-6, atol=1e-6)  # other operators: an ulp of y
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert layer(mode.from_tensor(x[0]), lengths=mode.from_tensor(lengths[0])).shape == (4, 3, 5)


def test_a_mask_with_a_dimension_of_channels_is_told_to_drop_it():
    with pytest.raises(ValueError, match=r"\[4, 5\], but got \[4, 1, 5\].*leave out its dimension of channels"):
        bn.BatchNorm1d(3)(make((4, 3, 5)), mask=torch.ones(4, 1, 5, dtype=torch.bool))


@pytest.mark.parametrize("options", [{}, {"virtual_batch_size": 2}], ids=str)
def test_a_residual_that_broadcasts_may_have_nan_under_the_mask(options):
    mask = torch.rand(4, 5) < 0.6
    mask[0] = True
    layer, x = bn.BatchNorm1d(3, activation="sigmoid", **options), make((4, 3, 5))
    residual = torch.where(mask.any(0), make((1, 3, 5)), torch.nan).expand(4, 3, 5).clone()
    residual = torch.where(mask[:, None], residual, torch.nan).double().requires_grad_()  # another dtype
    y = layer(x, residual, mask)
    y.sum().backward()
    z = bn.batch_norm(x, training=True, mask=mask, virtual_batch_size=options.get("virtual_batch_size"))
    expected = torch.where(mask[:, None], torch.sigmoid(z + residual.detach()), 0.0)
    assert torch.equal(y, expected)
    assert residual.grad.movedim(1, -1)[~mask].eq(0).all()
    assert residual.grad.isfinite().all()


def test_under_autocast_padding_does_not_count():
    """Two batches, one with more padding (of NaN), through a convolution of width 1 in bfloat16: the same y."""
    model = nn.Sequential(nn.Conv1d(2, 3, 1), bn.BatchNorm1d(3))
    x, lengths = make((4, 2, 6)), torch.tensor([6, 4, 5, 3])
    longer = torch.cat((x, torch.full((4, 2, 7), torch.nan)), 2)
    results = []
    for t in (x, longer):
        with torch.autocast("cpu", torch.bfloat16):
            results.append(model[1](model[0](t), lengths=lengths))
    assert results[0].dtype == torch.bfloat16
    assert torch.equal(results[1][:, :, :6], results[0])
    assert results[1][:, :, 6:].eq(0).all()


@pytest.mark.slow
def test_masks_compile_without_a_graph_break():
    layer = bn.BatchNorm1d(3, virtual_batch_size=2, activation="relu")
    eager = bn.BatchNorm1d(3, virtual_batch_size=2, activation="relu")
    x, lengths = make((5, 3, 6)), torch.tensor([6, 4, 0, 3, 2])
    y = torch.compile(layer, fullgraph=True, backend="aot_eager")(x, lengths=lengths)
    torch.testing.assert_close(y, eager(x, lengths=lengths), rtol=1e-6, atol=1e-6)  # a fused multiply-add: an ulp of y
    torch.testing.assert_close(layer.running_var, eager.running_var, rtol=1e-6, atol=1e-6)


def test_with_a_mask_too_an_eval_layer_exports_with_the_standard_operator():
    layer, x, lengths = bn.BatchNorm1d(3, activation="relu").eval(), make((4, 3, 5)), torch.tensor([5, 4, 0, 1])
    randomize(layer)
    program = torch.export.export(layer, (x,), {"lengths": lengths})
    assert "batchnorm" not in str([node.target for node in program.graph.nodes if node.op == "call_function"])
    y = program.module()(x, lengths=lengths)
    torch.testing.assert_close(y, layer(x, lengths=lengths), rtol=1e-5, atol=1e-6)  # torch's kernel: some ulp
