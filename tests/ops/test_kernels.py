"""The compiled operators against the float64 oracle: shapes, strides, dtypes, masks, activations, exactness."""

import pytest
import torch
from cases import DTYPES, LAYOUTS, SHAPES, laid_out, make, vectors
from compare import assert_close

from batchnorm import reference
from batchnorm.activations import Activation
from batchnorm.ops.cpu import COMPILED

pytestmark = pytest.mark.skipif(not COMPILED, reason="installed without a compiler")
compiled = torch.ops.batchnorm

EPS = 1e-5
# Beside the small shapes that all tests share, the ways to cut: several pieces, chunks and blocks of planes; short
# planes in several tiles; rows joined with a rest; channels in several tiles.
CUTS = {
    "planes_in_blocks": (40, 3, 20, 20),
    "planes_in_chunks": (2, 3, 75, 75),
    "planes_in_pieces": (3, 2, 300, 300),
    "short_planes": (9, 70, 7, 7),
    "shorter_than_a_line": (5, 40, 3, 1),
    "rows_joined": (1007, 5),
    "rows_of_37": (333, 37),
    "rows_in_pieces": (5000, 64),
    "channels_in_tiles": (11, 2500),
}
NAMES = ["none", "relu", "relu6", "leaky_relu", "elu", "silu", "gelu", "gelu_tanh", "hardswish", "sigmoid", "tanh"]
SLOPES = {"leaky_relu": 0.2, "elu": 1.3}


def activation_of(name):
    return Activation(name, SLOPES.get(name, 0.0))


def parameters(x, v):
    """weight and bias, of x's dtype or float32 beside a low-precision x."""
    given = v.get("weight"), v.get("bias")
    return [p.double() if p is not None and x.dtype == torch.float64 else p for p in given]


def run(x, v, dy, *, residual=None, activation=None, mask=None, training=True, keep_y=False):
    """y and all gradients by the compiled operators: in one call where there is no mask, else step by step."""
    activation = activation or Activation("none")
    act = (activation.code, activation.slope)
    w, b = parameters(x, v)
    if mask is None and training:
        y, statistics = compiled.forward(x, w, b, EPS, *act, residual, mask)
    elif training:
        statistics = compiled.measure(x, mask)
        y = compiled.normalize(x, statistics, w, b, EPS, *act, residual, mask)
    else:
        running = v["running_mean"], v["running_var"]
        y, statistics = compiled.infer(x, *running, w, b, EPS, *act, residual, mask, keep=True)
    count, mean, m2 = statistics
    var = m2 / count.clamp(min=1)
    kept = (None, y) if keep_y else (residual, None)
    sums = compiled.reduce(dy, x, statistics, w, b, EPS, *act, *kept, mask)
    if mask is None:
        dx, dresidual, *_ = compiled.backward(dy, x, statistics, w, b, EPS, *act, *kept, mask, 0, training, True, True)
    else:
        through = sums if training else None
        dx, dresidual = compiled.apply(dy, x, statistics, through, w, b, EPS, *act, *kept, mask, 0, True, True)
    gradients = dx, dresidual, *sums
    return y, mean, var, *gradients


def check(x, v, dy, **options):
    keep_y, training = options.pop("keep_y", False), options.pop("training", True)
    running = None if training else (v["running_mean"], v["running_var"])
    activation = options.get("activation") or Activation("none")
    y, mean, var, dx, dresidual, dbias, dweight = run(x, v, dy, keep_y=keep_y, training=training, **options)
    w, b = parameters(x, v)
    exact = reference.forward(x, w, b, EPS, running=running, **options)
    grads = reference.backward(dy, x, w, b, EPS, running=running, **options)
    assert activation is not None
    assert y.stride() == torch.empty_like(x, memory_format=suggested(x)).stride()

    # y is computed in 5 roundings of numbers no larger than the largest |z|, and rounded once to its own dtype.
    tall = max(1.0, float(exact.y.abs().max()) if x.numel() else 1.0)
    if x.dtype == torch.float64 and x.numel():  # its mean is one float64, so x - mean carries that one's rounding
        tall += float((exact.mean.abs() * (exact.var + EPS).rsqrt()).max())
    assert_close(y, exact.y, ulps=8, scale=tall)
    if training and x.numel():
        # Means and variances come from float32 deviations (float64 ones of float64), whatever the input's dtype.
        fine = 2e-15 if x.dtype == torch.float64 else 2e-7
        spread = float(exact.var.max().sqrt())
        assert (mean - exact.mean).abs().max() <= fine * spread + 1e-15 * (1 + exact.mean.abs().max())
        assert ((var - exact.var).abs() <= 5 * fine * exact.var + 1e-14).all()
    # Gradients are linear in dz: their errors are relative to the largest terms. Near a kink of the activation the
    # rounding of z (or of y, kept in x's dtype) decides the branch, so such a tensor says nothing.
    usable = away_from_kinks(activation, x, v, running, options) if x.numel() else torch.ones_like(x, dtype=torch.bool)
    if bool(usable.all()):
        coarse = 64 if keep_y else 16
        biggest = max(1.0, float(dy.double().abs().max()) if x.numel() else 1.0) * max(
            1.0, float((exact.var + EPS).rsqrt().max()) if x.numel() else 1.0
        )
        assert_close(dx, grads.dx, ulps=coarse, scale=biggest * 2)
        assert_close(dresidual, grads.dresidual, ulps=coarse, scale=biggest)
        n = max(1, x.numel() // max(x.size(1), 1))
        per_value = torch.finfo(y.dtype if keep_y else mean.dtype if x.dtype == torch.float64 else torch.float32).eps
        assert ((dbias - grads.dbias).abs() <= 4 * per_value * n * biggest).all()
        assert ((dweight - grads.dweight).abs() <= 16 * per_value * n * biggest).all()


def suggested(x):
    from torch._prims_common import suggest_memory_format

    return suggest_memory_format(x)


def away_from_kinks(activation, x, v, running, options):
    kinks = {"relu": [0], "relu6": [0, 6], "leaky_relu": [0], "elu": [0], "hardswish": [-3, 3]}.get(activation.name, [])
    z = reference.forward(
        x,
        v.get("weight"),
        v.get("bias"),
        EPS,
        running=running,
        residual=options.get("residual"),
        mask=options.get("mask"),
    ).y
    margin = 16 * torch.finfo(torch.float32 if x.dtype != torch.float64 else x.dtype).eps
    return torch.stack([(z - k).abs() > margin * (1 + z.abs()) for k in [*kinks, torch.inf]]).all(0)


# An expanded x has few different values, so that the scale nears 1 / sqrt(eps): beyond what 8 or 11 bits resolve.
CASES = [
    (layout, dtype)
    for layout in LAYOUTS
    for dtype in DTYPES
    if layout != "expanded" or dtype in (torch.float32, torch.float64)
]


@pytest.mark.parametrize(("layout", "dtype"), CASES, ids=str)
@pytest.mark.parametrize("name", [*SHAPES, *CUTS])
def test_layouts_and_dtypes(name, layout, dtype):
    torch.manual_seed(0)
    shape = {**SHAPES, **CUTS}[name]
    x, dy = laid_out(make(shape, dtype), layout), make(shape, dtype)
    check(x, vectors(shape[1]), dy)


# More than stays in the caches: where there are many tiles, each is measured and normalized before the next.
@pytest.mark.parametrize(
    ("dtype", "residual"), [(torch.float32, False), (torch.float32, True), (torch.bfloat16, True)], ids=str
)
@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((16, 83, 57, 58), "contiguous"),  # planes
        ((128, 203, 13, 13), "contiguous"),  # planes too short for sums of their own
        ((300, 1001, 3, 5), "contiguous"),  # shorter ones
        ((260, 16500), "contiguous"),  # channels in many tiles
        ((11, 83, 70, 70), "channels_last"),  # one tile
        ((3, 5, 600, 600), "contiguous"),  # few tiles
    ],
    ids=str,
)
def test_large_tensors(shape, layout, dtype, residual):
    x, dy = laid_out(make(shape, dtype), layout), make(shape, dtype)
    assert 2 * x.numel() * x.element_size() >= 16 << 20  # x and y
    check(x, vectors(shape[1]), dy, residual=laid_out(make(shape, dtype), layout) if residual else None)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(6, 20, 13, 11), (40, 70, 5, 5), (300, 24)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_activations_with_and_without_residual(name, dtype, shape, layout):
    torch.manual_seed(1)
    x, dy, residual = (laid_out(make(shape, dtype), layout) for _ in range(3))
    activation = activation_of(name)
    check(x, vectors(shape[1]), dy, activation=activation)
    check(x, vectors(shape[1]), dy, activation=activation, residual=residual, training=False)
    if activation.output_determines_derivative and dtype != torch.bfloat16:
        check(x, vectors(shape[1]), dy, activation=activation, residual=residual, keep_y=True)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("shape", [(6, 20, 13, 11), (40, 70, 3, 5), (300, 24), (7, 3, 70, 70)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_masked_samples_count_for_nothing(dtype, shape, layout):
    torch.manual_seed(2)
    x, dy, residual = (make(shape, dtype) for _ in range(3))
    mask = torch.rand(shape[0], *shape[2:]) < 0.6
    wide = mask.unsqueeze(1)
    clean = laid_out(x, layout)
    poisoned = laid_out(torch.where(wide, x, torch.nan), layout)
    poison = torch.where(wide, dy, torch.inf)
    v = vectors(shape[1])
    check(clean, v, dy, mask=mask, residual=residual, activation=Activation("silu"))
    for one, other in zip(
        run(clean, v, dy, mask=mask, residual=residual),
        run(poisoned, v, poison, mask=mask, residual=residual),
        strict=True,
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("given", [(), ("weight",), ("bias",), ("weight", "bias")], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_parameters_may_be_missing_and_of_either_dtype(given, dtype):
    torch.manual_seed(3)
    x, dy = make((6, 20, 13, 11), dtype), make((6, 20, 13, 11), dtype)
    for parameters in (torch.float32, dtype):
        v = vectors(20, parameters)
        check(x, {k: v[k] for k in given}, dy, activation=Activation("relu"))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(6, 20, 13, 11), (9, 70, 7, 7), (300, 24), (20, 1100)], ids=str)
def test_operands_of_other_layouts(shape, layout):
    """A gradient from .sum().backward() is expanded; a residual may be channels last beside a contiguous x."""
    torch.manual_seed(4)
    x, residual = make(shape), laid_out(make(shape), layout)
    check(x, vectors(shape[1]), torch.ones(()).expand(shape), residual=residual, activation=Activation("gelu"))
    check(residual, vectors(shape[1]), torch.ones(()).expand(shape), residual=x, activation=Activation("relu6"))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(8, 6, 64, 64), (64, 40, 7, 7), (16, 6, 14, 14)], ids=str)
@pytest.mark.parametrize("mu", [0.0, 1.0, 1e3, 1e4, 2e4, 1e5, 1e6])
def test_exact_at_any_mean(mu, shape, layout):
    torch.manual_seed(5)
    x = laid_out((torch.randn(shape, dtype=torch.float64) + mu).float(), layout)
    y, (_, mean, m2) = compiled.forward(x, None, None, EPS)
    exact = reference.forward(x, eps=EPS)
    within = exact.y.abs() <= 6
    assert (y - exact.y)[within].abs().max() <= 4e-6
    n = x.numel() // x.size(1)
    # A few roundings of float32. At 1e4 and 2e4 squares have so few bits that long sums would round them all alike.
    assert ((m2 / n - exact.var).abs() / exact.var).max() <= 2e-7
    assert (mean - exact.mean).abs().max() <= 1e-6


def test_a_sample_that_misleads_is_measured_again():
    """The first estimate of a block's mean comes from a sample; here all sampled values lie far from the others."""
    torch.manual_seed(6)
    rows = torch.randn(64, 256) + 1000
    rows[::8] = 0.0
    planes = torch.randn(1, 2, 64, 64) + 1000
    planes.view(2, 32, 128)[:, :, :16] = 0.0
    for x in (rows, planes):
        check(x, vectors(x.size(1)), torch.randn_like(x))


@pytest.mark.parametrize("shape", [(6, 20, 13, 11), (9, 70, 7, 7), (300, 24), (20, 1100), (40, 5)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_nonfinite_value_touches_its_channel_only(value, layout, shape):
    torch.manual_seed(7)
    clean = laid_out(make(shape), layout)
    x, dy, v = clean.clone(), make(shape), vectors(shape[1])
    x[2, 3] = value
    others = [c for c in range(shape[1]) if c != 3]
    activation = Activation("relu")
    for ours, untouched in zip(
        run(x, v, dy, activation=activation), run(clean, v, dy, activation=activation), strict=True
    ):
        channel = 1 if ours.dim() > 1 else 0
        assert torch.equal(
            ours.index_select(channel, torch.tensor(others)), untouched.index_select(channel, torch.tensor(others))
        )
    y, _, var, dx, *_ = run(x, v, dy, activation=activation)
    assert y[:, 3].isnan().all()
    assert dx[:, 3].isnan().all()
    assert var[3].isnan()


Z = torch.cat(
    [
        torch.linspace(-120, 120, 40001, dtype=torch.float64),
        torch.logspace(-40, 2, 2000, dtype=torch.float64),
        -torch.logspace(-40, 2, 2000, dtype=torch.float64),
    ]
)
UNCHANGED = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)[:, None]  # statistics that leave x as it is
ALONE = (None, None, 0.0)  # no weight, no bias, no eps
# In float32 the last places of z before an exponential matter: exp(z) is off by |z| eps relatively, so what decays like
# exp(-|z|) |z| is off by a few eps. gelu_tanh cancels 1 + tanh as torch does.
ULPS = {"gelu_tanh": 16, "silu": 16, "gelu": 8}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_activations_over_the_whole_range(name, dtype):
    activation = activation_of(name)
    z = Z.to(dtype)
    x = z[:, None]
    act = (activation.code, activation.slope)
    y = compiled.normalize(x, UNCHANGED, *ALONE, *act)[:, 0]
    dy = torch.ones_like(x)
    dz = compiled.apply(dy, x, UNCHANGED, None, *ALONE, *act)[0][:, 0]
    exact, slope = activation(z.double()), activation.derivative(z.double())
    eps, ulps = torch.finfo(dtype).eps, ULPS.get(name, 3)
    assert ((y.double() - exact).abs() <= ulps * eps * (1 + exact.abs())).all()
    assert ((dz.double() - slope).abs() <= 4 * ulps * eps).all()
    if activation.output_determines_derivative and name in ("elu", "sigmoid", "tanh"):
        from_y = compiled.apply(dy, x, UNCHANGED, None, *ALONE, *act, y=y[:, None])[0][:, 0]
        assert ((from_y.double() - slope).abs() <= 8 * eps).all()


@pytest.mark.parametrize("name", ["elu", "sigmoid", "tanh", "silu"])
def test_small_results_keep_their_relative_precision(name):
    """Where torch's float32 keeps full relative precision near zero or in a tail, so do these."""
    z = Z[(Z.abs() < 80) & (Z.abs() > 1e-30)].float()  # no subnormal results
    activation = activation_of(name)
    y = compiled.normalize(z[:, None], UNCHANGED, *ALONE, activation.code, activation.slope)[:, 0]
    exact = activation(z.double())
    assert ((y.double() - exact).abs() <= 4 * torch.finfo(torch.float32).eps * exact.abs()).all()


@pytest.mark.parametrize("name", NAMES)
def test_activations_at_special_values_are_torchs(name):
    z = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, 1e38, -1e38, 1e-45, 6, 3, -3, 0, 0, 0, 0, 0, 0, 0])
    activation = activation_of(name)
    y = compiled.normalize(z[:, None], UNCHANGED, *ALONE, activation.code, activation.slope)[:, 0]
    expected = activation(z)
    if name == "gelu":
        expected[1] = torch.inf  # torch's vector loop says NaN there and its scalar loop inf; the limit is inf
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_conversions_are_torchs_for_every_value(dtype):
    """All 65536 values in; out, floats on, between and beside them, rounded to nearest even."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    same = compiled.normalize(every[:, None], UNCHANGED, *ALONE)[:, 0]
    kept = every.where(every.isfinite() | every.isnan(), every)  # x - 0 keeps infinities too
    assert torch.equal(same.isnan(), kept.isnan())
    number = ~kept.isnan() & (kept != 0)  # (-0) - 0 + 0 is +0
    assert torch.equal(same[number], kept[number])

    finite = every[every.isfinite()].float().sort().values
    values = torch.cat([finite, (finite[1:] + finite[:-1]) / 2, finite * (1 + 2.0**-20)])
    # x is 1, so that z = weight exactly: its rounding to y's dtype is what is seen.
    x = torch.ones(1, values.numel(), dtype=dtype)
    n = values.numel()
    y = compiled.normalize(x, UNCHANGED.expand(3, n).contiguous(), values, None, 0.0)[0]
    expected = values.to(dtype)
    assert torch.equal(y[values != 0], expected[values != 0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(3)}, "dimension"),
        ({"x": torch.ones(3, 4, dtype=torch.int32)}, "float32, float64"),
        ({"residual": torch.ones(3, 5)}, "residual must have the input's shape"),
        ({"residual": torch.ones(3, 4).double()}, "residual must have the input's dtype"),
        ({"weight": torch.ones(5)}, "weight must have one value a channel"),
        ({"weight": torch.ones(4).double()}, "weight must have the input's dtype"),
        ({"x": torch.ones(1, 4)}, "no variance"),
        ({"eps": 0.0}, "eps must be positive"),
        ({"act": 11}, "no activation number 11"),
    ],
)
def test_wrong_arguments_are_refused(change, message):
    arguments = {
        "x": torch.ones(3, 4),
        "weight": None,
        "bias": None,
        "eps": EPS,
    }
    with pytest.raises(RuntimeError, match=message):
        compiled.forward(**{**arguments, **change})
