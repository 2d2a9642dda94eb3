"""Where there is no kernel of ours, a call is torch's own operators, and no more of them than torch.nn's own.

Tensors on the meta device stand in for a GPU's: nothing computes, and which operators would is counted, backward too.
(Of fake CUDA tensors a torch without CUDA differentiates nothing, and writes into none.)
"""

import pytest
import torch
from cases import make
from compare import assert_close
from counting import Passes
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import batchnorm as bn
from batchnorm.ops import choose, cpu

SHAPE = (8, 4, 16, 16)
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
LAYERS = {
    "float32": (lambda **o: bn.BatchNorm2d(4, **o), FP32),
    "bfloat16": (lambda **o: bn.BatchNorm2d(4, **o), BF16),
    ".half()": (lambda **o: bn.BatchNorm2d(4, **o).half(), FP16),
    ".bfloat16()": (lambda **o: bn.BatchNorm2d(4, **o).bfloat16(), BF16),
    "cumulative": (lambda **o: bn.BatchNorm2d(4, momentum=None, **o), FP32),
    "skip": (lambda **o: bn.BatchNorm2d(4, nonfinite="skip", **o), FP32),
    "biased": (lambda **o: bn.BatchNorm2d(4, unbiased=False, **o), FP32),
    "untracked": (lambda **o: bn.BatchNorm2d(4, track_running_stats=False, **o), FP32),
    "not affine": (lambda **o: bn.BatchNorm2d(4, affine=False, **o), FP32),
}


@pytest.fixture
def native(monkeypatch):
    """Tensors on the CPU are served as on a device without kernels of ours."""
    monkeypatch.setattr(cpu, "COMPILED", False)


def passes(build, dtype, training, with_residual, device="meta"):
    """The operators of y, and of its backward, on tensors of x's size."""
    with torch.device(device):
        layer = build(activation="relu").train(training)
        x, residual = torch.empty(SHAPE, dtype=dtype), torch.empty(SHAPE, dtype=dtype)
    x.requires_grad_()
    with Passes(x.numel()) as forward:
        y = layer(x, residual) if with_residual else layer(x)
    dy = torch.empty_like(y)
    with Passes(x.numel()) as backward:
        y.backward(dy)
    assert y.dtype == x.grad.dtype == dtype
    assert forward.made | backward.made == {dtype}, "no copy in another dtype"
    return forward.operators, backward.operators


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_a_call_is_torchs_own_operators(name, training, with_residual):
    forward, backward = passes(*LAYERS[name], training, with_residual)
    assert forward == ["native_batch_norm", *(["add_"] if with_residual else []), "relu"]
    assert backward == ["threshold_backward", "native_batch_norm_backward"]


def test_torch_nns_own_are_no_fewer():
    def build(activation):
        return nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())

    assert passes(build, FP32, True, False) == passes(*LAYERS["float32"], True, False)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", [name for name in LAYERS if not name.startswith(".")])  # fake layers are not cast
def test_on_fake_cuda_tensors(name, training):
    build, dtype = LAYERS[name]
    if (training or name == "untracked") and torch.version.cuda is None:
        pytest.skip("this torch, built without CUDA, writes into no fake CUDA tensor")
    with FakeTensorMode(), torch.device("cuda"), torch.no_grad():
        layer, x = build(activation="relu").train(training), torch.empty(SHAPE, dtype=dtype)
        with Passes(x.numel()) as forward:
            y = layer(x, x)
    assert y.device.type == "cuda"
    assert forward.operators in (["native_batch_norm", "add_", "relu"], ["cudnn_batch_norm", "add_", "relu"])
    assert forward.made == {dtype}


PLAIN = {"mask": {}, "virtual batches": {"virtual_batch_size": 6}, "renorm": {"renorm": bn.Renorm()}}


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("shape", [SHAPE, (2048, 4)])
@pytest.mark.parametrize("case", PLAIN)
def test_plain_operators_make_no_float64_tensor_of_the_size_of_x(case, shape, dtype):
    """float32 throughout, but for sums. What a sum with another dtype does inside is the device's own."""
    mask = torch.ones(shape[:1] + shape[2:], dtype=torch.bool, device="meta") if case == "mask" else None
    layer = (bn.BatchNorm2d if len(shape) == 4 else bn.BatchNorm1d)(4, device="meta", activation="gelu", **PLAIN[case])
    x = torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)
    with Passes(x.numel()) as passes:
        y = layer(x, mask=mask)
        y.backward(torch.empty_like(y))
    assert torch.float64 not in passes.made
    assert "native_batch_norm" not in passes.operators


@pytest.mark.parametrize("name", [*LAYERS, "raise"])
def test_the_same_as_our_kernels(name, monkeypatch):
    """Values, gradients, statistics: within the rounding of float32 sums, or of one value of a dtype."""
    build, dtype = LAYERS.get(name) or (lambda **o: bn.BatchNorm2d(4, nonfinite="raise", **o), FP32)
    found = []
    for compiled in (True, False):
        monkeypatch.setattr(cpu, "COMPILED", compiled)
        torch.manual_seed(0)
        layer, x, residual = build(activation="tanh"), make(SHAPE, dtype), make(SHAPE, dtype)
        assert (choose.why_not_cpu(x) is None) == compiled
        for _ in range(2):
            x = x.detach().requires_grad_()
            y = layer(x, residual)
            y.backward(residual)
        z = layer.eval()(x, residual)
        found.append((y, x.grad, z, *layer.buffers(), layer.measured.mean, layer.measured.m2 / layer.measured.count))
        assert layer.measured.count == 8 * 16 * 16
    # float32 sums of 2048 values; of the others one rounding of y, of size 1, and of a gradient that is made of such.
    tolerance = {FP32: 1e-5, BF16: 2**-6, FP16: 2**-9}[dtype]
    for ours, theirs in zip(*found, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(theirs, ours, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("nonfinite", ["skip", "raise"])
def test_what_is_not_finite_is_kept_out(nonfinite, native):
    layer, x = bn.BatchNorm1d(2, nonfinite=nonfinite), torch.randn(8, 2)
    x[0, 1] = torch.inf
    if nonfinite == "raise":
        with pytest.raises(RuntimeError, match="the batch has NaN or infinite statistics in 1 of 2 channels"):
            layer(x)
        assert layer.num_batches_tracked == 0
    else:
        layer(x)
        assert layer.skipped == 1
        assert layer.running_mean[0] != 0
    assert (layer.running_mean[1], layer.running_var[1]) == (0, 1)


@pytest.mark.parametrize("compiled", [True, False])
def test_what_was_skipped_is_counted_in_one_tensor(compiled, monkeypatch):
    """A captured CUDA graph goes on to write into the tensor that it was captured with."""
    monkeypatch.setattr(cpu, "COMPILED", compiled)
    layer, x = bn.BatchNorm1d(2, nonfinite="skip"), torch.full((8, 2), torch.nan)
    layer(x)
    counter = layer._batchnorm_skipped
    layer(x)
    layer(torch.randn(8, 2))
    assert layer._batchnorm_skipped is counter
    assert counter.item() == layer.skipped == 2


def test_an_empty_batch_and_a_lonely_value(native):
    layer = bn.BatchNorm1d(2)
    assert layer(torch.empty(0, 2, 3)).shape == (0, 2, 3)
    assert (layer.running_mean.tolist(), layer.running_var.tolist()) == ([0, 0], [1, 1])
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        layer(torch.randn(1, 2))


@pytest.mark.parametrize("training", [True, False])
def test_running_statistics_of_another_dtype(training, native):
    """Which torch refuses and ours take."""
    x, running = make((16, 3)), (torch.ones(3, dtype=torch.float64), torch.full((3,), 2.0, dtype=torch.float64))
    y = bn.batch_norm(x, *running, training=training)
    exact = [torch.ones(3, dtype=torch.float64), torch.full((3,), 2.0, dtype=torch.float64)]
    expected = nn.functional.batch_norm(x.double(), *exact, training=training)
    assert_close(y, expected)
    for ours, theirs in zip(running, exact, strict=True):  # measured in float32
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


BAD = {
    "channels": lambda layer, x: layer(x[:, :2]),
    "one value": lambda layer, x: layer(x[:1]),
    "weight's dtype": lambda layer, x: layer(x.double()),
    "residual's shape": lambda layer, x: layer(x, x[:, :, None]),
    "residual's type": lambda layer, x: layer(x, 3.0),
    "dimensions": lambda layer, x: layer(x[0, 0]),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_refused_is_told_as_our_kernels_tell_it_and_nothing_moves(case, monkeypatch):
    said = []
    for compiled in (True, False):
        monkeypatch.setattr(cpu, "COMPILED", compiled)
        layer = bn.BatchNorm1d(3)
        with pytest.raises((RuntimeError, ValueError, TypeError)) as raised:
            BAD[case](layer, torch.ones(4, 3))
        said.append((raised.type, str(raised.value)))
        assert (layer.running_mean.sum(), layer.running_var.sum(), layer.num_batches_tracked) == (0, 3, 0)
    assert said[0] == said[1]


def test_the_usual_call_is_not_looked_at_in_python(native, monkeypatch):
    """Which on a GPU would take longer than a small batch."""
    layer, x = bn.BatchNorm1d(3, activation="relu"), torch.randn(4, 3)
    monkeypatch.setattr("batchnorm.nn.layer.normalize_batch", None)
    for training in (True, False):
        layer.train(training)(x, x)
    assert layer.num_batches_tracked == 1
    assert layer.measured.count == 4
