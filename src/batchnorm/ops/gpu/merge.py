"""What is done once per channel, in float64: partial sums added in a fixed order, running statistics, constants.

moments      partials of `measure` -> statistics, running statistics moved, constants
constants    statistics (and sums) given -> constants
gradients    partials of `gradients` -> sums, dweight, dbias, constants
tracked      statistics given -> running statistics moved
"""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportInvalidTypeForm=false
import triton
import triton.language as tl

from .values import BIAS, MEAN_DZ, MEAN_HIGH, MEAN_LOW, SCALE, SLOPE_DZ


@triton.jit
def _added(partials, c, there, channels, inner, count, BLOCK_PARTS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr):
    """The sum of each channel's `count` partial sums, of which `inner` one after the other are of one channel."""
    total = tl.zeros([BLOCK_PARTS, BLOCK_CHANNELS], tl.float64)
    for first in range(0, count, BLOCK_PARTS):
        part = first + tl.arange(0, BLOCK_PARTS)
        at = (part // inner).to(tl.int64) * channels * inner + part % inner
        total += tl.load(
            partials + at[:, None] + (c * inner)[None, :], (part < count)[:, None] & there[None, :], 0.0
        ).to(tl.float64)
    return tl.sum(total, 0)


@triton.jit
def _both_added(partials, c, there, channels, inner, count, BLOCK_PARTS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr):
    """The same of the first sums and of the second, which follow them."""
    second = partials + tl.cast(count, tl.int64) * channels
    return (
        _added(partials, c, there, channels, inner, count, BLOCK_PARTS, BLOCK_CHANNELS),
        _added(second, c, there, channels, inner, count, BLOCK_PARTS, BLOCK_CHANNELS),
    )


@triton.jit
def _rstd(count, m2, eps):
    """1 / sqrt(variance + eps): the same bits in forward and backward."""
    return 1.0 / tl.sqrt(m2 / tl.where(count < 1, 1.0, count) + eps)


@triton.jit
def _write_constants(constants, c, there, channels, count, mean, m2, weight, bias, eps):
    """The rows that every map reads; returns rstd."""
    to = constants + c
    dtype = constants.dtype.element_ty
    rstd = _rstd(count, m2, eps)
    high = mean.to(dtype)
    low = tl.where(high == mean, 0.0, (mean - high.to(tl.float64)).to(dtype))  # inf - inf is NaN
    scale = rstd
    if weight is not None:
        scale = rstd * tl.load(weight + c, there, 0.0).to(tl.float64)
    tl.store(to + MEAN_HIGH * channels, high, there)
    tl.store(to + MEAN_LOW * channels, low, there)
    tl.store(to + SCALE * channels, scale.to(dtype), there)
    if bias is not None:
        tl.store(to + BIAS * channels, tl.load(bias + c, there, 0.0).to(dtype), there)
    else:
        tl.store(to + BIAS * channels, tl.zeros_like(high), there)
    return rstd


@triton.jit
def _write_gradients_constants(constants, c, there, channels, count, rstd, sum_dz, sum_dz_xhat):
    dtype = constants.dtype.element_ty
    samples = tl.where(count < 1, 1.0, count)
    tl.store(constants + MEAN_DZ * channels + c, (sum_dz / samples).to(dtype), there)
    tl.store(constants + SLOPE_DZ * channels + c, (sum_dz_xhat / samples * rstd).to(dtype), there)


@triton.jit
def _store(to, value, there):
    """A value of float64, rounded to float32 before it is to 16 bits, as torch does; the interpreter cannot else."""
    if to.dtype.element_ty != tl.float64:
        value = value.to(tl.float32)
    tl.store(to, value.to(to.dtype.element_ty), there)


@triton.jit
def _move(running, c, there, measured, momentum, sound):
    """running = (1 - momentum) * running + momentum * measured, rounded at the end."""
    tracked = tl.load(running + c, there, 0.0).to(tl.float64)
    moved = tl.where(sound, tracked + (measured - tracked) * momentum, tracked)
    _store(running + c, moved, there)


@triton.jit
def _track(
    running_mean, running_var, c, there, count, mean, m2, momentum, UNBIASED: tl.constexpr, SKIP: tl.constexpr
):  # fmt: skip
    missing = 1 if UNBIASED else 0
    left = count - missing
    sound = count > 0
    enough = left > 0
    if SKIP:
        finite = ((mean - mean) == 0) & ((m2 - m2) == 0)
        sound, enough = sound & finite, enough & finite
    _move(running_mean, c, there, mean, momentum, sound)
    _move(running_var, c, there, m2 / tl.where(left < 1, 1.0, left), momentum, enough)


@triton.jit
def moments(
    partials, shifts, count_of, statistics, weight, bias, constants, running_mean, running_var, batches,
    samples: tl.float64, eps: tl.float64, momentum: tl.float64, channels, inner, parts,
    UNBIASED: tl.constexpr, SKIP: tl.constexpr, BLOCK_PARTS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """`count_of` is where a mask's count is; else `samples` is it."""
    c = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    there = c < channels
    first, second = _both_added(partials, c, there, channels, inner, parts, BLOCK_PARTS, BLOCK_CHANNELS)
    count = tl.zeros_like(first) + (tl.load(count_of) if count_of is not None else samples)
    beside = first / tl.where(count < 1, 1.0, count)
    mean = tl.load(shifts + c, there, 0.0).to(tl.float64) + beside
    m2 = second - first * beside
    m2 = tl.where(m2 < 0, 0.0, m2)  # a NaN stays
    none = count == 0
    mean, m2 = tl.where(none, 0.0, mean), tl.where(none, 0.0, m2)
    tl.store(statistics + c, count, there)
    tl.store(statistics + channels + c, mean, there)
    tl.store(statistics + 2 * channels + c, m2, there)
    if constants is not None:
        _write_constants(constants, c, there, channels, count, mean, m2, weight, bias, eps)
    if running_mean is not None:
        _track(running_mean, running_var, c, there, count, mean, m2, momentum, UNBIASED, SKIP)
    if batches is not None:
        if tl.program_id(0) == 0:
            tl.store(batches, tl.load(batches) + 1)


@triton.jit
def constants(
    statistics, running_mean, running_var, sums, weight, bias, constants, eps: tl.float64, channels,
    BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """The statistics are read, or written where running ones are given."""
    c = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    there = c < channels
    if running_mean is not None:
        mean = tl.load(running_mean + c, there, 0.0).to(tl.float64)
        m2 = tl.load(running_var + c, there, 0.0).to(tl.float64)
        count = tl.zeros_like(mean)
        if statistics is not None:
            tl.store(statistics + c, count, there)
            tl.store(statistics + channels + c, mean, there)
            tl.store(statistics + 2 * channels + c, m2, there)
    else:
        count = tl.load(statistics + c, there, 0.0)
        mean = tl.load(statistics + channels + c, there, 0.0)
        m2 = tl.load(statistics + 2 * channels + c, there, 0.0)
    rstd = _write_constants(constants, c, there, channels, count, mean, m2, weight, bias, eps)
    if sums is not None:
        sum_dz, sum_dz_xhat = tl.load(sums + c, there, 0.0), tl.load(sums + channels + c, there, 0.0)
        _write_gradients_constants(constants, c, there, channels, count, rstd, sum_dz, sum_dz_xhat)


@triton.jit
def gradients(
    partials, statistics, sums, dweight, dbias, constants, eps: tl.float64, channels, inner, parts,
    BLOCK_PARTS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """The second sum is of dz * (x - mean), and times rstd that of dz * xhat."""
    c = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    there = c < channels
    sum_dz, along = _both_added(partials, c, there, channels, inner, parts, BLOCK_PARTS, BLOCK_CHANNELS)
    count = tl.load(statistics + c, there, 0.0)
    m2 = tl.load(statistics + 2 * channels + c, there, 0.0)
    rstd = _rstd(count, m2, eps)
    sum_dz_xhat = along * rstd
    if sums is not None:
        tl.store(sums + c, sum_dz, there)
        tl.store(sums + channels + c, sum_dz_xhat, there)
    if dweight is not None:
        _store(dweight + c, sum_dz_xhat, there)
    if dbias is not None:
        _store(dbias + c, sum_dz, there)
    _write_gradients_constants(constants, c, there, channels, count, rstd, sum_dz, sum_dz_xhat)


@triton.jit
def tracked(
    statistics, running_mean, running_var, momentum: tl.float64, channels,
    UNBIASED: tl.constexpr, SKIP: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """The running statistics moved toward those."""
    c = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    there = c < channels
    count = tl.load(statistics + c, there, 0.0)
    mean = tl.load(statistics + channels + c, there, 0.0)
    m2 = tl.load(statistics + 2 * channels + c, there, 0.0)
    _track(running_mean, running_var, c, there, count, mean, m2, momentum, UNBIASED, SKIP)
