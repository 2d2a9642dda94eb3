"""Any shape, strides, dtype and options: the compiled operators agree with the float64 oracle."""

import pytest
import torch
from compare import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st

from batchnorm import reference
from batchnorm.activations import Activation
from batchnorm.ops.cpu import COMPILED

pytestmark = pytest.mark.skipif(not COMPILED, reason="installed without a compiler")
compiled = torch.ops.batchnorm
EPS = 1e-3  # so that channels of a few nearly equal values do not blow rounding up

shapes = st.lists(st.integers(1, 9), min_size=0, max_size=3).flatmap(
    lambda space: st.tuples(st.integers(1, 40), st.integers(1, 70), *map(st.just, space))
)


@st.composite
def tensors(draw, shape, dtype):
    """Values of the shape with any order of dimensions in memory, some of them with gaps, reversed parts or offset."""
    order = draw(st.permutations(range(len(shape))))
    steps = [draw(st.integers(1, 2)) for _ in shape]
    seed = draw(st.integers(0, 2**16))
    full = [shape[d] * steps[d] for d in order]
    values = torch.randn(full, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    back = [order.index(d) for d in range(len(shape))]
    x = values.permute(back)[tuple(slice(None, None, step) for step in steps)]
    assert x.shape == shape
    return x


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_forward_and_backward(data):
    shape = data.draw(shapes, label="shape")
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]), label="dtype")
    x = data.draw(tensors(shape, dtype))
    dy = data.draw(tensors(shape, dtype))
    residual = data.draw(st.none() | tensors(shape, dtype))
    vector = st.none() | tensors(shape[1:2], dtype)
    if dtype.itemsize == 2:
        vector = vector | tensors(shape[1:2], torch.float32)
    weight, bias = data.draw(vector), data.draw(vector)
    masks = st.none() | st.integers(0, 2**16).map(
        lambda seed: torch.rand(shape[0], *shape[2:], generator=torch.Generator().manual_seed(seed)) < 0.7
    )
    mask = data.draw(masks, label="mask")
    # Smooth ones: beside a kink, a rounding decides which way the gradient goes.
    activation = Activation(data.draw(st.sampled_from(["none", "silu", "gelu", "gelu_tanh", "sigmoid", "tanh"])))
    act = (activation.code, activation.slope)

    statistics = compiled.measure(x, mask)
    count = statistics[0].max()
    y = compiled.normalize(x, statistics, weight, bias, EPS, *act, residual, mask)
    if mask is not None or x.numel() > x.size(1):  # one value in a channel is refused
        together, statistics_too = compiled.forward(x, weight, bias, EPS, *act, residual, mask)
        assert_close(together, y.double())
        assert torch.equal(statistics_too, statistics)
    rest = (weight, bias, EPS, *act, residual, None, mask, 0)
    dbias, dweight = sums = compiled.reduce(dy, x, statistics, *rest)
    dx, dresidual = compiled.apply(dy, x, statistics, sums, *rest, True, True)
    for one, other in zip(
        (dx, dresidual, dweight, dbias),
        compiled.backward(dy, x, statistics, *rest, True, True, True),
        strict=True,
    ):
        if other is not None:
            assert_close(other, one.double(), ulps=4)

    exact = reference.forward(x, weight, bias, EPS, residual=residual, activation=activation, mask=mask)
    grads = reference.backward(dy, x, weight, bias, EPS, residual=residual, activation=activation, mask=mask)
    steepest = float((exact.var.nan_to_num() + EPS).rsqrt().max()) * (
        1 if weight is None else float(weight.abs().max())
    )
    # Rounding of x - mean and of the scale, then of the result to its dtype; gradients are steepest times as large.
    # (With nothing to count there is no variance.)
    fine = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    coarse = torch.finfo(dtype).eps
    size = 1 + float(exact.y.abs().max())
    assert (y - exact.y).abs().max() <= 32 * fine * (size + steepest) + coarse * size
    largest = float(dy.double().abs().max()) * (1 + steepest) * (1 + size)
    for ours, true in ((dx, grads.dx), (dresidual, grads.dresidual)):
        assert (ours - true).abs().max() <= 64 * fine * largest * size + coarse * (1 + float(true.abs().max()))
    for ours, true in ((dbias, grads.dbias), (dweight, grads.dweight)):
        assert (ours - true).abs().max() <= 16 * fine * int(count) * largest * size
