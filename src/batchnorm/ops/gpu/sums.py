"""The sums over a tensor's values: one reading, float32 (float64 of float64), one partial result a program.

measure       v and v * v, where v = x - shift
gradients     dz and dz * (x - mean), where dz = dy * act'(z)

Every channel has one shift, near its values, so that nothing cancels in v * v: the median of three means of three
samples, which one outlier does not move. Under a mask samples may be missing; then the shift is given.
"""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportInvalidTypeForm=false
import triton
import triton.language as tl

from .values import BIAS, MEAN_HIGH, MEAN_LOW, SCALE, constant, dz_of, reach


@triton.jit
def _mean_of_three(x, first, positions, row, inner, COMPUTE: tl.constexpr):
    total = tl.load(x + _sample(first, positions, row, inner)).to(COMPUTE)
    for i in tl.static_range(1, 3):
        total += tl.load(x + _sample(first + 3 * i, positions, row, inner)).to(COMPUTE)
    return total / 3.0


@triton.jit
def _sample(number, positions, row, inner):
    """Where the first channel's sample of that number lies, of nine spread over its positions."""
    position = positions * number // 9
    return position // inner * row + position % inner


@triton.jit
def _shift(x, positions, row, inner, COMPUTE: tl.constexpr):
    """The median of three means; x points to the first channel's first value, of one channel or of several."""
    a = _mean_of_three(x, 0, positions, row, inner, COMPUTE)
    b = _mean_of_three(x, 1, positions, row, inner, COMPUTE)
    c = _mean_of_three(x, 2, positions, row, inner, COMPUTE)
    return tl.maximum(tl.minimum(a, b), tl.minimum(tl.maximum(a, b), c))


@triton.jit
def _add(
    x, dy, residual, y, mask, rows, columns, x_row, row, r, c, center, low, scale, bias, slope, inner, first, second,
    GRADIENTS: tl.constexpr, ACT: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """The sums with a tile's terms."""
    there = (r < rows)[:, None] & (c < columns)[None, :]
    if mask is not None:
        there = there & (tl.load(mask + r[:, None] * inner + (c % inner)[None, :], there, 0) != 0)
    value = tl.load(x + (r[:, None] * x_row + c[None, :]), there, 0.0).to(COMPUTE)
    value = (value - center) - low if GRADIENTS else value - center
    if GRADIENTS:
        dz = dz_of(dy, residual, y, r[:, None] * row + c[None, :], there, value, scale, bias, slope, ACT, COMPUTE)
        dz = tl.where(there, dz, 0.0)
        return first + dz, tl.fma(dz, tl.where(there, value, 0.0), second)
    else:
        value = tl.where(there, value, 0.0)
        return first + value, tl.fma(value, value, second)


@triton.jit
def sums(
    x, dy, residual, y, mask, constants, shifts, partials, slope: tl.float64,
    rows, columns, inner, channels, positions, tiles, parts_of_columns, rows_per_part, columns_per_part,
    x_row, x_channel, row, channel, sample_row, sample_channel,
    ALIGN: tl.constexpr, PLANES: tl.constexpr, GRADIENTS: tl.constexpr, GIVEN: tl.constexpr, ACT: tl.constexpr,
    COMPUTE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """partials (2, parts, columns), or of planes (2, parts, channels); of `measure` shifts (channels,) too."""
    columns = columns * ALIGN
    row, x_row = tl.cast(row, tl.int64) * ALIGN, tl.cast(x_row, tl.int64) * ALIGN
    slope = tl.full([], slope, COMPUTE)
    tile, part, first_row, last_row, first_column, last_column, own, every = reach(
        rows, columns, inner, channels, tiles, parts_of_columns, rows_per_part, columns_per_part, PLANES, BLOCK_COLUMNS
    )
    r, c = tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_COLUMNS)
    x_start = x
    if PLANES:
        x_start += tile.to(tl.int64) * x_channel * ALIGN
        start = tile.to(tl.int64) * channel * ALIGN
        if dy is not None:
            dy += start
        if residual is not None:
            residual += start
        if y is not None:
            y += start
    if GRADIENTS:
        center = constant(constants, MEAN_HIGH, own, every, channels)
        low = constant(constants, MEAN_LOW, own, every, channels)
        scale = constant(constants, SCALE, own, every, channels)
        bias = constant(constants, BIAS, own, every, channels)
    else:
        low, scale, bias = 0.0, 0.0, 0.0
        if GIVEN:
            center = tl.load(shifts + own, every, 0.0).to(COMPUTE)
        else:
            sampled = x + own.to(tl.int64) * sample_channel
            center = _shift(sampled, tl.cast(positions, tl.int64), sample_row, inner, COMPUTE)
            if part == 0:
                tl.store(shifts + own, center.to(tl.float64), every)
    if not PLANES:
        center = center[None, :]
        if GRADIENTS:
            low, scale, bias = low[None, :], scale[None, :], bias[None, :]
    first = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], COMPUTE)
    second = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], COMPUTE)
    for i in range(first_row, last_row, BLOCK_ROWS):
        if PLANES:
            for j in range(first_column, last_column, BLOCK_COLUMNS):
                first, second = _add(
                    x_start, dy, residual, y, mask, last_row, last_column, x_row, row, i + r, j + c,
                    center, low, scale, bias, slope, inner, first, second, GRADIENTS, ACT, COMPUTE,
                )  # fmt: skip
        else:
            first, second = _add(
                x_start, dy, residual, y, mask, last_row, columns, x_row, row, i + r,
                first_column + c, center, low, scale, bias, slope, inner, first, second, GRADIENTS, ACT, COMPUTE,
            )  # fmt: skip
    parts = tl.num_programs(0) // tiles
    if PLANES:
        to = partials + part.to(tl.int64) * channels + tile
        tl.store(to, tl.sum(tl.sum(first, 1), 0))
        tl.store(to + parts.to(tl.int64) * channels, tl.sum(tl.sum(second, 1), 0))
    else:
        to = partials + part.to(tl.int64) * columns + first_column + c
        tl.store(to, tl.sum(first, 0), every)
        tl.store(to + parts.to(tl.int64) * columns, tl.sum(second, 0), every)
