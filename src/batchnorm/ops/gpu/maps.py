"""The maps of a tensor's values to as many others: one reading and one writing each.

normalize     y = act((x - mean) * scale + bias + residual)
apply         dx = (dz - mean(dz) - xhat * mean(dz * xhat)) * scale, and dz for the residual
"""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportInvalidTypeForm=false
import triton
import triton.language as tl

from .activations import NONE, activated
from .values import BIAS, MEAN_DZ, MEAN_HIGH, MEAN_LOW, SCALE, SLOPE_DZ, constant, dz_of, reach


@triton.jit
def _normalize(
    x, residual, mask, y, rows, columns, x_row, row, r, c, high, low, scale, bias, slope, inner,
    ACT: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    there = (r < rows)[:, None] & (c < columns)[None, :]
    value = (tl.load(x + (r[:, None] * x_row + c[None, :]), there, 0.0).to(COMPUTE) - high) - low
    z = tl.fma(value, scale, bias)
    at = r[:, None] * row + c[None, :]
    if residual is not None:
        z += tl.load(residual + at, there, 0.0).to(COMPUTE)
    out = activated(z, slope, ACT)
    if mask is not None:
        out = tl.where(tl.load(mask + r[:, None] * inner + (c % inner)[None, :], there, 0) != 0, out, 0.0)
    tl.store(y + at, out.to(y.dtype.element_ty), there)


@triton.jit
def _apply(
    x, dy, residual, y, mask, dx, dresidual, rows, columns, x_row, row, r, c,
    high, low, scale, bias, mean_dz, slope_dz, slope, inner,
    MEASURED: tl.constexpr, ACT: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    there = (r < rows)[:, None] & (c < columns)[None, :]
    at = r[:, None] * row + c[None, :]
    value = high
    if MEASURED or (ACT != NONE and y is None):
        value = (tl.load(x + (r[:, None] * x_row + c[None, :]), there, 0.0).to(COMPUTE) - high) - low
    dz = dz_of(dy, residual, y, at, there, value, scale, bias, slope, ACT, COMPUTE)
    through = dz
    if MEASURED:
        through = tl.fma(-value, slope_dz, dz - mean_dz)
    through = through * scale
    if mask is not None:
        present = tl.load(mask + r[:, None] * inner + (c % inner)[None, :], there, 0) != 0
        dz, through = tl.where(present, dz, 0.0), tl.where(present, through, 0.0)
    if dx is not None:
        tl.store(dx + at, through.to(dx.dtype.element_ty), there)
    if dresidual is not None:
        tl.store(dresidual + at, dz.to(dresidual.dtype.element_ty), there)


@triton.jit
def _tile(
    x, dy, residual, y, mask, dx, dresidual, rows, columns, x_row, row, r, c,
    high, low, scale, bias, mean_dz, slope_dz, slope, inner,
    GRADIENTS: tl.constexpr, MEASURED: tl.constexpr, ACT: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    if GRADIENTS:
        _apply(
            x, dy, residual, y, mask, dx, dresidual, rows, columns, x_row, row, r, c,
            high, low, scale, bias, mean_dz, slope_dz, slope, inner, MEASURED, ACT, COMPUTE,
        )  # fmt: skip
    else:
        _normalize(
            x, residual, mask, y, rows, columns, x_row, row, r, c, high, low, scale, bias, slope, inner, ACT, COMPUTE
        )


@triton.jit
def maps(
    x, dy, residual, y, mask, constants, dx, dresidual, slope: tl.float64,
    rows, columns, inner, channels, tiles, parts_of_columns, rows_per_part, columns_per_part,
    x_row, x_channel, row, channel,
    ALIGN: tl.constexpr, PLANES: tl.constexpr, GRADIENTS: tl.constexpr, MEASURED: tl.constexpr, ACT: tl.constexpr,
    COMPUTE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """`normalize` writes y, `apply` (GRADIENTS) dx and dresidual, each if given; `apply` may read y."""
    columns = columns * ALIGN
    row, x_row = tl.cast(row, tl.int64) * ALIGN, tl.cast(x_row, tl.int64) * ALIGN
    slope = tl.full([], slope, COMPUTE)
    tile, _, first_row, last_row, first_column, last_column, own, every = reach(
        rows, columns, inner, channels, tiles, parts_of_columns, rows_per_part, columns_per_part, PLANES, BLOCK_COLUMNS
    )
    r, c = tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_COLUMNS)
    if PLANES:
        start = tile.to(tl.int64) * channel * ALIGN
        x += tile.to(tl.int64) * x_channel * ALIGN
        if dy is not None:
            dy += start
        if residual is not None:
            residual += start
        if y is not None:
            y += start
        if dx is not None:
            dx += start
        if dresidual is not None:
            dresidual += start
    high, low = (
        constant(constants, MEAN_HIGH, own, every, channels),
        constant(constants, MEAN_LOW, own, every, channels),
    )
    scale, bias = constant(constants, SCALE, own, every, channels), constant(constants, BIAS, own, every, channels)
    mean_dz, slope_dz = high, high
    if GRADIENTS and MEASURED:
        mean_dz = constant(constants, MEAN_DZ, own, every, channels)
        slope_dz = constant(constants, SLOPE_DZ, own, every, channels)
    if not PLANES:
        high, low, scale, bias = high[None, :], low[None, :], scale[None, :], bias[None, :]
        mean_dz, slope_dz = mean_dz[None, :], slope_dz[None, :]
    for i in range(first_row, last_row, BLOCK_ROWS):
        if PLANES:
            for j in range(first_column, last_column, BLOCK_COLUMNS):
                _tile(
                    x, dy, residual, y, mask, dx, dresidual, last_row, last_column, x_row, row, i + r, j + c,
                    high, low, scale, bias, mean_dz, slope_dz, slope, inner, GRADIENTS, MEASURED, ACT, COMPUTE,
                )  # fmt: skip
        else:
            _tile(
                x, dy, residual, y, mask, dx, dresidual, last_row, last_column, x_row, row, i + r, first_column + c,
                high, low, scale, bias, mean_dz, slope_dz, slope, inner, GRADIENTS, MEASURED, ACT, COMPUTE,
            )  # fmt: skip
