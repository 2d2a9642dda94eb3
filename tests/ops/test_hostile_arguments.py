"""Arguments that no careful caller passes: each is served rightly, or refused, and then nothing has moved."""

import copy
import gc
import sys
import warnings
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import batchnorm as bn
from batchnorm import activations
from batchnorm.ops import kernels, plain

operators = torch.ops.batchnorm


def arguments(n=100, channels=5):
    torch.manual_seed(0)
    vectors = {"running_mean": torch.zeros(channels), "running_var": torch.ones(channels)}
    return {"input": torch.randn(n, channels), **vectors, "weight": torch.ones(channels), "bias": torch.zeros(channels)}


def extra(name, n=100, channels=5):
    return {"residual": torch.randn(n, channels), "mask": torch.rand(n) < 0.7}.get(name)


# Memory that is not there


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("left", [0, 8], ids=["freed", "cut"])
@pytest.mark.parametrize("name", ["input", "weight", "bias", "running_mean", "running_var", "residual", "mask"])
def test_a_storage_that_was_freed_or_cut_is_refused(name, left, training):
    given = arguments()
    if name not in given:
        given[name] = extra(name)
    others = {key: (value, value.clone()) for key, value in given.items() if key != name}
    given[name].untyped_storage().resize_(left)
    with pytest.raises(RuntimeError):
        bn.batch_norm(**given, training=training)
    for value, before in others.values():
        assert torch.equal(value, before)


def test_a_freed_gradient_is_refused():
    x, statistics = torch.randn(6, 5), kernels.measure(torch.randn(6, 5), None)
    dy = torch.randn(6, 5)
    dy.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="no memory behind it"):
        operators.backward(dy, x, statistics, None, None, 1e-5)


@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var", "statistics", "mask", "residual"])
@pytest.mark.parametrize("kind", ["meta", "fake"])
def test_a_tensor_without_values_among_others_is_refused(kind, name):
    given = arguments(6)
    x, mean, var, weight, bias = given.values()
    statistics, mask, residual = kernels.measure(x, None), torch.ones(6, dtype=torch.bool), torch.randn(6, 5)
    named = {"weight": weight, "bias": bias, "statistics": statistics, "mask": mask, "residual": residual}
    named |= {"running_mean": mean, "running_var": var}
    mode = FakeTensorMode()
    named[name] = named[name].to("meta") if kind == "meta" else mode.from_tensor(named[name])
    weight, bias, statistics, mask, residual, mean, var = named.values()
    rest = (weight, bias, 1e-5, 0, 0.0)
    calls = {
        "forward": lambda: operators.forward(x, *rest, residual, mask),
        "forward_": lambda: operators.forward_(x, *rest[:3], mean, var, None, 0.1, 0, 0.0, residual, mask),
        "infer": lambda: operators.infer(x, mean, var, *rest, residual, mask),
        "normalize": lambda: operators.normalize(x, statistics, *rest, residual, mask),
        "backward": lambda: operators.backward(x, x, statistics, *rest, residual, None, mask),
        "update_running_": lambda: operators.update_running_(mean, var, statistics, 0.1),
    }
    takes = {
        "statistics": ("normalize", "backward", "update_running_"),
        "running_mean": ("forward_", "infer", "update_running_"),
    }
    takes["running_var"] = takes["running_mean"]
    for call in takes.get(name, ("forward", "forward_", "infer", "normalize", "backward")):
        with pytest.raises((RuntimeError, AssertionError)):
            calls[call]()


# Masks


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("true", [1, 2, 128, 255])
def test_every_byte_but_0_is_true(true, training):
    flags = np.random.default_rng(0).random(300) < 0.6
    mask = torch.from_numpy((flags * np.uint8(true)).view(np.bool_))
    given, same = arguments(300), arguments(300)
    for cut in (None, 7):
        y = bn.batch_norm(**given, training=training, mask=mask, virtual_batch_size=cut)
        assert torch.equal(
            y, bn.batch_norm(**same, training=training, mask=torch.from_numpy(flags), virtual_batch_size=cut)
        )
        assert torch.equal(given["running_var"], same["running_var"])


def test_every_byte_but_0_is_true_in_plain_operators():
    mask = torch.from_numpy(np.full(8, 255, np.uint8).view(np.bool_))
    x = torch.randn(8, 3)
    torch.testing.assert_close(plain.measure(x, mask), plain.measure(x, None))


# Virtual batches


@pytest.mark.parametrize("size", [sys.maxsize, sys.maxsize - 2, 2**62, 9])
@pytest.mark.parametrize("n", [1, 8])
def test_a_virtual_batch_of_any_size_is_at_most_the_batch(n, size):
    x = torch.randn(n, 3, 2)
    ours, whole = bn.BatchNorm1d(3, virtual_batch_size=size), nn.BatchNorm1d(3)
    torch.testing.assert_close(ours(x), whole(x))
    torch.testing.assert_close(ours.running_var, whole.running_var)
    assert ours.measured.count == 2 * n


@pytest.mark.parametrize("shape", [(5, 3), (9, 3), (2, 3), (5, 3, 2)], ids=str)
def test_eager_and_transforms_cut_alike(shape):
    """A rest of one value joins the virtual batch before it, though that be the only one (N = size + 1)."""
    size = 4 if shape[0] > 2 else 1
    if size == 1 and len(shape) == 2:
        size = shape[0]
    torch.manual_seed(1)
    x, tangent = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)

    def f(x):
        return bn.batch_norm(x, training=True, virtual_batch_size=size, activation="silu")

    # Each part by torch alone.
    n = shape[0]
    ends = list(range(0, n, size))
    if len(shape) == 2 and n % size == 1 and len(ends) > 1:
        ends.pop()
    parts = [x[a:b] for a, b in zip(ends, [*ends[1:], n], strict=True)]
    expected = torch.cat([F.silu(F.batch_norm(part, None, None, training=True)) for part in parts])
    torch.testing.assert_close(f(x), expected)
    torch.testing.assert_close(torch.vmap(f)(x[None])[0], expected)
    value, slope = torch.func.jvp(f, (x,), (tangent,))
    torch.testing.assert_close(value, expected)
    h = 1e-6
    # Central differences in float64: h^2 of the third derivative, and 1e-16 / h.
    torch.testing.assert_close(slope, (f(x + h * tangent) - f(x - h * tangent)) / (2 * h), rtol=1e-5, atol=1e-7)
    assert torch.autograd.gradgradcheck(f, (x.requires_grad_(),), atol=1e-4)


# Residuals


def unfit_residuals():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dense = torch.randn(8, 3)
        return {
            "complex": torch.randn(8, 3, dtype=torch.complex64),
            "quantized": torch.quantize_per_tensor(dense, 0.1, 0, torch.qint8),
            "sparse": dense.to_sparse(),
            "csr": dense.to_sparse_csr(),
            "mkldnn": dense.to_mkldnn(),
            "larger": torch.randn(5, 8, 3),
            "longer": torch.randn(8, 1, 3),
            "unlike": torch.randn(7, 3),
            "meta": dense.to("meta"),
        }


@pytest.mark.parametrize("options", [{}, {"virtual_batch_size": 4}, {"activation": "relu"}], ids=str)
@pytest.mark.parametrize("name", unfit_residuals())
def test_a_residual_that_cannot_be_added_moves_nothing(name, options):
    layer = bn.BatchNorm1d(3, **options)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises((RuntimeError, ValueError)):
        layer(torch.randn(8, 3), unfit_residuals()[name])
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())
    assert layer.measured is None


@pytest.mark.parametrize("shape", [(), (3,), (1, 3), (8, 1), (8, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64, torch.bool], ids=str)
def test_a_residual_is_added_as_by_plus(dtype, shape):
    torch.manual_seed(2)
    x, residual = torch.randn(8, 3), (torch.randn(shape) * 3).to(dtype)
    expected = F.relu(F.batch_norm(x, None, None, training=True) + residual)
    y = bn.batch_norm(x, training=True, residual=residual, activation="relu")
    # Of its dtype and shape, too. A few roundings of float32 at values of size 1 before anything is added.
    atol = 0.05 if y.dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=atol)


# Running statistics


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_running_statistics_that_require_grad_are_refused_as_torch_refuses_them(name, training):
    given = arguments()
    given[name].requires_grad_()
    given["input"].requires_grad_()
    for function in (F.batch_norm, bn.batch_norm):
        with pytest.raises(RuntimeError, match=name):
            function(**given, training=training)
    assert not given["running_mean"].any()
    with torch.no_grad():
        torch.testing.assert_close(
            bn.batch_norm(**given, training=False), F.batch_norm(**given, training=False), rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize(
    "options", [{}, {"momentum": None}, {"virtual_batch_size": 4}, {"renorm": bn.Renorm()}], ids=str
)
@pytest.mark.parametrize("with_grad", [True, False])
def test_autograd_learns_that_running_statistics_were_written(options, with_grad):
    layer = bn.BatchNorm1d(3, **options)
    w = torch.ones(3, requires_grad=True)
    product = (w * layer.running_var).sum()  # saves running_var for backward
    with torch.set_grad_enabled(with_grad):
        layer(torch.randn(8, 3))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_statistics_made_in_inference_mode_are_written_there_alone():
    with torch.inference_mode():
        layer = bn.BatchNorm1d(3)
        layer(torch.randn(8, 3))
    with pytest.raises(RuntimeError, match="inference"):
        layer(torch.randn(8, 3))
    assert int(layer.num_batches_tracked) == 1


# Errors


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "x"),
    [
        ({}, torch.randn(1, 500)),
        ({"nonfinite": "raise"}, torch.full((8, 500), torch.nan)),
        ({}, torch.randn(4, 499)),
        ({}, torch.randn(4, 500, dtype=torch.float64)),
    ],
    ids=["lonely", "nonfinite", "channels", "dtype"],
)
def test_an_error_does_not_keep_the_input_alive(options, x):
    model, x = nn.Sequential(bn.BatchNorm1d(500, **options)), x.clone()
    alive = weakref.ref(x)
    gc.collect()
    gc.disable()
    try:
        with pytest.raises((ValueError, RuntimeError)) as said:
            model(x)
        del said, x
        assert alive() is None
    finally:
        gc.enable()


# Derivatives where there is no slope


@pytest.mark.parametrize("name", [*activations.NAMES, "gelu_tanh"])
def test_derivatives_at_special_values_are_torchs(name):
    activation = activations.Activation(name, {"leaky_relu": 0.2, "elu": 1.3}.get(name, 0.0))
    z = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 6, 3, -3, 1e38, -1e38] * 4)  # torch's vectors are 16
    given = z.clone().requires_grad_()
    activation(given).backward(torch.full_like(z, 2.0))
    unchanged = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)[:, None]
    dy = torch.full_like(z, 2.0)[:, None]
    dx, _ = operators.apply(dy, z[:, None], unchanged, None, None, None, 0.0, activation.code, activation.slope)
    expected = given.grad
    if name in ("relu6", "elu", "hardswish"):  # torch's loop over vectors and the one over the rest differ at NaN
        expected = torch.where(z.isnan(), 2.0, expected)  # as the latter, and as on a GPU
    if name in ("silu", "gelu", "gelu_tanh"):  # torch's are NaN at infinity, where the limits are 1 and 0
        expected = torch.where(z == torch.inf, 2.0, torch.where(z == -torch.inf, 0.0, expected))
        dx = torch.where(z.isinf()[:, None], expected[:, None], dx)
    torch.testing.assert_close(dx[:, 0], expected, rtol=1e-5, atol=1e-6, equal_nan=True)


# torch.jit.trace


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "options", [{"momentum": None}, {"unbiased": False}, {"virtual_batch_size": 4}, {"nonfinite": "skip"}], ids=str
)
def test_a_traced_layer_is_saved_and_loaded(options, training, tmp_path):
    layer, x = bn.BatchNorm1d(3, **options).train(training), torch.randn(8, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(copy.deepcopy(layer), x, check_trace=False)
        torch.jit.save(traced, tmp_path / "traced.pt")
        loaded = torch.jit.load(tmp_path / "traced.pt")
    torch.testing.assert_close(loaded(x), layer(x))
