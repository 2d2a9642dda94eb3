"""What sums and maps share: where a program walks, its channels' constants, and dz at a tile's values."""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportInvalidTypeForm=false
import triton
import triton.language as tl

from .activations import NONE, through, through_output

# The rows of a call's constants, (6, C), that merge.py writes.
MEAN_HIGH = tl.constexpr(0)
MEAN_LOW = tl.constexpr(1)
SCALE = tl.constexpr(2)  # rstd * weight
BIAS = tl.constexpr(3)
MEAN_DZ = tl.constexpr(4)
SLOPE_DZ = tl.constexpr(5)  # mean(dz * xhat) * rstd


@triton.jit
def reach(
    rows, columns, inner, channels, tiles, parts_of_columns, rows_per_part, columns_per_part,
    PLANES: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """What a program walks: tile, part, first and last row and column, its channel or its columns', which are there."""
    tile, part = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    first_row = (part // parts_of_columns).to(tl.int64) * rows_per_part
    last_row = tl.minimum(first_row + rows_per_part, rows)
    if PLANES:
        first_column = part % parts_of_columns * columns_per_part
        last_column = tl.minimum(first_column + columns_per_part, columns)
        return tile, part, first_row, last_row, first_column, last_column, tile, tile >= 0
    else:
        first_column = tile * BLOCK_COLUMNS
        column = first_column + tl.arange(0, BLOCK_COLUMNS)
        return tile, part, first_row, last_row, first_column, columns, column // inner % channels, column < columns


@triton.jit
def constant(constants, ROW: tl.constexpr, own, there, channels):
    """A row of the constants at these channels."""
    return tl.load(constants + ROW * channels + own, there, 0.0)


@triton.jit
def dz_of(
    dy, residual, y, at, there, centered, scale, bias, slope, ACT: tl.constexpr, COMPUTE: tl.constexpr
):  # fmt: skip
    """dy * act'(z) at a tile; z by the very arithmetic of the forward pass, so that both see one sign."""
    gradient = tl.load(dy + at, there, 0.0).to(COMPUTE)
    if ACT == NONE:
        return gradient
    elif y is not None:
        return through_output(gradient, tl.load(y + at, there, 0.0).to(COMPUTE), slope, ACT)
    else:
        z = tl.fma(centered, scale, bias)
        if residual is not None:
            z += tl.load(residual + at, there, 0.0).to(COMPUTE)
        return through(gradient, z, slope, ACT)
