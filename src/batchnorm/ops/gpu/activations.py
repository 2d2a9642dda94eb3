"""The activations of `batchnorm.activations` in Triton, with their codes: act(z), act'(z), and act' of act(z).

Comparisons with NaN take the same side as torch's own function.
"""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportInvalidTypeForm=false
import triton
import triton.language as tl

NONE = tl.constexpr(0)
RELU = tl.constexpr(1)
RELU6 = tl.constexpr(2)
LEAKY_RELU = tl.constexpr(3)
ELU = tl.constexpr(4)
SILU = tl.constexpr(5)
GELU = tl.constexpr(6)
GELU_TANH = tl.constexpr(7)
HARDSWISH = tl.constexpr(8)
SIGMOID = tl.constexpr(9)
TANH = tl.constexpr(10)

_ROOT_HALF = tl.constexpr(0.7071067811865476)
_DENSITY = tl.constexpr(0.3989422804014327)  # 1 / sqrt(2 pi)
_CUBE = tl.constexpr(0.044715)
_ROOT_2_PI = tl.constexpr(0.7978845608028654)  # sqrt(2 / pi)


@triton.jit
def _expm1(z):
    """exp(z) - 1 of z <= 0: near 0 by its series, of which the first term left out is 1e-17 of the result."""
    series = z * 0.0 + 1.0
    for i in tl.static_range(14):
        series = 1.0 + z * series / (15 - i)
    return tl.where(z > -0.5, z * series, tl.exp(z) - 1.0)


@triton.jit
def _sigmoid(z):
    return 1.0 / (1.0 + tl.exp(-z))


@triton.jit
def _tanh(z):
    t = _expm1(-2.0 * tl.abs(z))
    size = -t / (t + 2.0)
    return tl.where(z < 0, -size, size)


@triton.jit
def _at_least_zero(z):
    return tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def activated(z, slope, ACT: tl.constexpr):
    """act(z)."""
    if ACT == RELU:
        return _at_least_zero(z)
    elif ACT == RELU6:
        return tl.minimum(_at_least_zero(z), 6.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACT == LEAKY_RELU:
        return tl.where(z > 0, z, z * slope)
    elif ACT == ELU:
        return tl.where(z > 0, z, slope * _expm1(tl.where(z > 0, 0.0, z)))
    elif ACT == SILU:
        return z * _sigmoid(z)
    elif ACT == GELU:
        return 0.5 * z * (1.0 + tl.erf(z * _ROOT_HALF))
    elif ACT == GELU_TANH:
        return 0.5 * z * (1.0 + _tanh((z + z * z * z * _CUBE) * _ROOT_2_PI))
    elif ACT == HARDSWISH:
        return z * tl.where(z < -3, 0.0, tl.where(z > 3, 6.0, z + 3)) / 6.0
    elif ACT == SIGMOID:
        return _sigmoid(z)
    elif ACT == TANH:
        return _tanh(z)
    else:
        return z


@triton.jit
def through(dy, z, slope, ACT: tl.constexpr):
    """dy * act'(z)."""
    if ACT == RELU:
        return tl.where(z <= 0, 0.0, dy)
    elif ACT == RELU6:
        return tl.where((z <= 0) | (z >= 6), 0.0, dy)
    elif ACT == LEAKY_RELU:
        return tl.where(z > 0, dy, dy * slope)
    elif ACT == ELU:
        return tl.where(z <= 0, dy * (slope * tl.exp(tl.where(z <= 0, z, 0.0))), dy)
    elif ACT == SILU:
        s = _sigmoid(z)
        return dy * (s * (1.0 + z * (1.0 - s)))
    elif ACT == GELU:
        density = tl.exp(-0.5 * z * z) * _DENSITY
        return dy * (0.5 * (1.0 + tl.erf(z * _ROOT_HALF)) + z * density)
    elif ACT == GELU_TANH:
        t = _tanh((z + z * z * z * _CUBE) * _ROOT_2_PI)
        inner = (1.0 + z * z * 3.0 * _CUBE) * _ROOT_2_PI
        return dy * (0.5 * (1.0 + t) + 0.5 * z * (1.0 - t * t) * inner)
    elif ACT == HARDSWISH:
        return tl.where(z <= -3, 0.0, tl.where(z < 3, dy * (z / 3.0 + 0.5), dy))
    elif ACT == SIGMOID:
        return dy * (_sigmoid(z) * _sigmoid(-z))
    elif ACT == TANH:
        t = _tanh(z)
        return dy * (1.0 - t * t)
    else:
        return dy


@triton.jit
def through_output(dy, y, slope, ACT: tl.constexpr):
    """dy * act'(z) of y = act(z), where y determines it."""
    if ACT == ELU:
        return tl.where(y <= 0, dy * (y + slope), dy)
    elif ACT == SIGMOID:
        return dy * (y * (1.0 - y))
    elif ACT == TANH:
        return dy * (1.0 - y * y)
    else:
        return through(dy, y, slope, ACT)
