"""More than 2^31 elements, and offsets of more than 2^32 bytes, without the memory for them."""

import mmap

import pytest
import torch
from cases import make, vectors
from compare import assert_close

from batchnorm import reference
from batchnorm.activations import Activation
from batchnorm.ops.cpu import COMPILED

pytestmark = pytest.mark.skipif(not COMPILED, reason="installed without a compiler")
compiled = torch.ops.batchnorm
FAR = 2**31 + 8  # elements: past 32 bits itself, and in bytes


@pytest.mark.parametrize(
    ("shape", "repeats"), [((1, 2, 2**15), 2**15 + 3), ((1, 256), 2**23 + 5)], ids=["planes", "rows"]
)
def test_sums_over_more_values_than_32_bits_count(shape, repeats):
    """One sample expanded, which is read where it is."""
    sample = make(shape)
    x = sample.expand(repeats, *shape[1:])
    assert x.numel() > 2**31
    n = x.numel() // x.size(1)
    statistics = compiled.measure(x)
    count, mean, m2 = statistics
    values = sample.double().transpose(0, 1).flatten(1)
    assert (count == n).all()
    exact_mean, exact_var = values.mean(1), values.var(1, correction=0)
    # Each block's mean is as good as one of its own size, and blocks are merged in float64.
    torch.testing.assert_close(mean, exact_mean, rtol=0, atol=4e-7)
    torch.testing.assert_close(m2 / n, exact_var, rtol=1e-6, atol=1e-12)
    sum_dz, sum_dz_xhat = compiled.reduce(x, x, statistics, None, None, 1e-5)
    xhat = (values - exact_mean[:, None]) * torch.rsqrt(exact_var + 1e-5)[:, None]
    # A float32 sum of at most 4096 values, of size 10 at most, before float64 takes over.
    torch.testing.assert_close(sum_dz / n, exact_mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sum_dz_xhat / n, (values * xhat).mean(1), rtol=1e-5, atol=1e-5)


WINDOWS = {
    "samples_apart": ((3, 4, 20, 30), (FAR, 600, 30, 1)),
    "channels_apart": ((4, 3, 20, 30), (600, FAR, 30, 1)),
    "short_planes_apart": ((3, 40, 7, 7), (FAR, 49, 7, 1)),
    "rows_apart": ((3, 40), (FAR, 1)),
    "values_apart": ((4, 5, 3), (5, 1, FAR)),
}


@pytest.mark.parametrize(("shape", "strides"), WINDOWS.values(), ids=WINDOWS)
def test_strides_past_32_bits(shape, strides):
    last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))

    def window():
        # Memory that is only promised: the pages that nobody touches do not exist.
        promised = mmap.mmap(-1, 2 * (last + 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        view = torch.frombuffer(promised, dtype=torch.bfloat16).as_strided(shape, strides)
        return view.copy_(make(shape))

    x, dy, residual = window(), window(), window()
    v = vectors(shape[1])
    weight, bias, act = v["weight"], v["bias"], Activation("silu")
    y, statistics = compiled.forward(x, weight, bias, 1e-5, act.code, act.slope, residual)
    dx, _, dweight, _ = compiled.backward(dy, x, statistics, weight, bias, 1e-5, act.code, act.slope, residual)
    options = {"residual": residual, "activation": act}
    assert_close(y, reference.forward(x, weight, bias, **options).y, ulps=2)
    exact = reference.backward(dy, x, weight, bias, **options)
    # Terms are dy / std, of size 10.
    assert_close(dx, exact.dx, ulps=2, scale=10)
    assert_close(dweight, exact.dweight, ulps=8, scale=10 * x.numel() / x.size(1))
