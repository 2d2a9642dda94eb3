"""virtual_batch_size: each virtual batch is normalized by itself, and all of them are tracked as one batch."""

import copy
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from cases import laid_out, make
from compare import assert_close
from stepping import assert_step, cut, randomize

import batchnorm as bn
from batchnorm.ops import kernels, plain

SIZES = [2, 3, 4, 5, 7, 100]  # of 7 items: rests of 1, 1, 3, 2, none; larger than the batch
SHAPES = [(7, 3), (7, 3, 1), (7, 3, 5), (7, 3, 4, 5), (7, 3, 2, 3, 4)]
CLASSES = {2: bn.BatchNorm1d, 3: bn.BatchNorm1d, 4: bn.BatchNorm2d, 5: bn.BatchNorm3d}


def chunked(x, size, weight, bias):
    """torch's, on each virtual batch."""
    parts = [x[part] for part in cut(x.size(0), size, x[0, 0].numel())]
    return torch.cat([F.batch_norm(part, None, None, weight, bias, training=True) for part in parts])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_gradients_and_tracking_are_the_oracles(shape, size):
    assert_step(randomize(CLASSES[len(shape)](3, virtual_batch_size=size)), make(shape))


@pytest.mark.parametrize("size", [2, 3, 4, 100])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_values_and_gradients_are_torchs_on_each_chunk(layout, size):
    x, dy, weight, bias = make((7, 3, 4, 5)), make((7, 3, 4, 5)), torch.rand(3) + 0.5, torch.randn(3)
    results = []
    for function, dtype in ((bn.batch_norm, torch.float32), (chunked, torch.float32), (chunked, torch.float64)):
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in (laid_out(x, layout), weight, bias)]
        if function is chunked:
            y = chunked(leaves[0], size, *leaves[1:])
        else:
            y = function(leaves[0], None, None, *leaves[1:], training=True, virtual_batch_size=size)
        results.append((y, *torch.autograd.grad(y, leaves, dy.to(dtype))))
    for ours, torchs, exact in zip(*results, strict=True):
        assert_close(ours, exact, peer=torchs)


@pytest.mark.parametrize(
    ("items", "sizes"), [(6, [2, 2, 2]), (7, [2, 2, 3]), (8, [3, 3, 2]), (3, [3]), (9, [2] * 3 + [3])]
)
def test_a_rest_of_one_value_joins_the_virtual_batch_before_it(items, sizes):
    """Not so a rest of one item that has several values: it has a variance."""
    size = sizes[0]
    ends = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    x = make((items, 2))
    y = bn.batch_norm(x, training=True, virtual_batch_size=size)
    expected = [F.batch_norm(x[slice(*part)].double(), None, None, training=True) for part in pairwise(ends)]
    assert_close(y, torch.cat(expected), ulps=600)  # sigma of two or three values may be small: x / sigma rounds
    image = make((7, 2, 2, 2))
    y = bn.batch_norm(image, training=True, virtual_batch_size=2)
    assert_close(y[6:], F.batch_norm(image[6:].double(), None, None, training=True), ulps=60)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", [(9, 4), (7, 4, 5)], ids=str)
@pytest.mark.parametrize("size", [2, 4, 50])
def test_compiled_and_plain_operators_agree(size, shape, masked):
    x, dy = make(shape), make(shape)
    mask = torch.rand(shape[:1] + shape[2:]) < 0.7 if masked else None
    operands = plain.Operands(x, torch.rand(4), torch.rand(4), None, mask)
    settings = plain.Settings(1e-5, bn.activations.parse("silu"), size)
    y, statistics = kernels.forward(operands, settings)
    expected = plain.measure(x, mask, size)
    assert torch.equal(statistics[0], expected[0])
    torch.testing.assert_close(statistics, expected, rtol=1e-5, atol=1e-5)  # short sums in float32 in the one
    torch.testing.assert_close(y, plain.normalize(operands, expected, settings), rtol=1e-4, atol=1e-4)
    given = (dy, operands, None, expected, settings)
    steepest = plain.Statistics(*expected).rstd(1e-5).max().item()
    for a, b in zip(
        kernels.backward(*given, True, True, False), plain.backward(*given, True, True, False), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * max(1.0, steepest))


def test_the_running_statistics_move_once_by_the_whole_batchs():
    layer, whole = bn.BatchNorm1d(3, virtual_batch_size=2), bn.BatchNorm1d(3)
    x = make((7, 3)) + torch.arange(7.0)[:, None]  # the spread between virtual batches counts
    layer(x), whole(x)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(getattr(layer, name), getattr(whole, name), rtol=1e-6, atol=0)
    assert int(layer.measured.count) == 7


def test_in_eval_there_is_one_batch():
    layer = randomize(bn.BatchNorm1d(3, virtual_batch_size=2)).eval()
    assert_step(layer, make((7, 3)))
    assert_step(layer, make((1, 3)))


def test_second_derivatives_and_forward_mode():
    def function(x, weight):
        return bn.batch_norm(x, weight=weight, training=True, virtual_batch_size=3, activation="tanh")

    inputs = (make((7, 2), torch.float64).requires_grad_(), torch.rand(2, dtype=torch.float64).requires_grad_())
    assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_torch_func_agrees_with_torch_on_each_chunk():
    x, weights = make((2, 7, 3), torch.float64), torch.rand(2, 3, dtype=torch.float64) + 0.5

    def ours(t, w):
        return bn.batch_norm(t, weight=w, training=True, virtual_batch_size=3)

    def torchs(t, w):
        return chunked(t, 3, w, None)

    close = {"rtol": 1e-9, "atol": 1e-9}
    expected = torch.stack([torchs(t, w) for t, w in zip(x, weights, strict=True)])
    torch.testing.assert_close(torch.func.vmap(ours)(x, weights), expected, **close)
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        torch.testing.assert_close(transform(ours)(x[0], weights[0]), transform(torchs)(x[0], weights[0]), **close)


def test_no_samples_are_no_virtual_batches():
    layer = bn.BatchNorm1d(3, virtual_batch_size=2)
    assert layer(torch.rand(0, 3)).shape == (0, 3)
    assert int(layer.measured.count) == 0
    assert torch.equal(layer.running_mean, torch.zeros(3))
    assert torch.equal(layer.running_var, torch.ones(3))


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_layer_compiles_without_a_graph_break(dynamic):
    layer = bn.BatchNorm1d(3, virtual_batch_size=3)
    eager, compiled = copy.deepcopy(layer), torch.compile(layer, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for items in (7, 8):
        x = make((items, 3)).requires_grad_()
        y, expected = compiled(x), eager(x)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)  # sigma of three values: x / sigma rounds
        gradients = [torch.autograd.grad(t.square().sum(), x)[0] for t in (y, expected)]
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)
    for a, b in zip(layer.buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("items", "size"), [(1, 4), (6, 1), (1, 1)])
def test_virtual_batches_of_one_value_each_raise_and_change_nothing(items, size):
    layer = bn.BatchNorm1d(3, virtual_batch_size=size)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        layer(make((items, 3)))
    assert int(layer.num_batches_tracked) == 0
    assert layer.running_mean.eq(0).all()


@pytest.mark.parametrize("size", [0, -1, 2.5, "2"])
def test_a_size_that_is_none_raises(size):
    with pytest.raises(ValueError, match="virtual_batch_size must be a positive integer"):
        bn.BatchNorm1d(3, virtual_batch_size=size)
    with pytest.raises(ValueError, match="virtual_batch_size must be a positive integer"):
        bn.batch_norm(make((4, 3)), training=True, virtual_batch_size=size)
