"""Every value is walked once, by the program of its channel: views and cuts, without a kernel."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from batchnorm.ops.gpu.cut import cut
from batchnorm.ops.gpu.layout import like, view_of

SIZES = st.integers(1, 12)
SHAPES = st.one_of(
    st.tuples(st.integers(1, 3000), st.integers(1, 300)),
    st.tuples(st.integers(1, 80), st.integers(1, 70), st.integers(1, 60)),
    st.tuples(SIZES, SIZES, st.integers(1, 40), st.integers(1, 40)),
    st.tuples(SIZES, SIZES, SIZES, SIZES, SIZES),
)
FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def walked(made, channels):
    """Offsets and channels of the values of each program, as reach() and the loops of the kernels compute them."""
    view, found = made.view, []
    for program in range(made.programs):
        tile, part = program % made.tiles, program // made.tiles
        first_row = part // made.parts_of_columns * made.rows_per_part
        rows = np.arange(first_row, min(first_row + made.rows_per_part, view.rows))
        if view.planes:
            first = part % made.parts_of_columns * made.columns_per_part
            columns = np.arange(first, min(first + made.columns_per_part, view.columns))
            start, own = tile * view.channel, np.full(len(columns), tile)
        else:
            first = tile * made.block_columns
            columns = np.arange(first, min(first + made.block_columns, view.columns))
            start, own = 0, columns // view.inner % channels
        offsets = start + rows[:, None] * view.row + columns[None, :]
        found.append((offsets, np.broadcast_to(own, offsets.shape)))
    return found


@settings(deadline=None, max_examples=150)
@given(shape=SHAPES, last=st.booleans(), sums=st.booleans(), masked=st.booleans())
def test_every_value_is_walked_once(shape, last, sums, masked):
    x = torch.empty(shape, device="meta")
    if last and len(shape) in FORMATS:
        x = x.contiguous(memory_format=FORMATS[len(shape)])
    view, same = view_of(x)
    assert same is x
    made = cut(view, sums, masked)
    found = walked(made, x.size(1))
    offsets = np.concatenate([o.ravel() for o, _ in found])
    channels = np.concatenate([c.ravel() for _, c in found])
    assert len(offsets) == x.numel()
    # In memory, the channel of each value, by the strides of x.
    numbered = torch.arange(shape[1]).view(1, -1, *[1] * (len(shape) - 2)).expand(shape)
    in_memory = torch.empty(math.prod(shape), dtype=torch.int64).as_strided(shape, x.stride()).copy_(numbered)
    flat = in_memory.as_strided((math.prod(shape),), (1,))
    assert (np.bincount(offsets, minlength=x.numel()) == 1).all()
    assert (flat.numpy()[offsets] == channels).all()


@settings(deadline=None, max_examples=100)
@given(shape=SHAPES)
def test_partial_sums_are_of_few_values_and_fill_the_tensors_that_hold_them(shape):
    view, x = view_of(torch.empty(shape, device="meta"))
    made = cut(view, sums=True)
    per_part = 1 if view.planes else made.view.columns // x.size(1)
    assert made.partials == made.parts * per_part
    # In float32 each of a tile's sums adds so many values before it is added to others in float64.
    rows, columns = min(made.rows_per_part, made.view.rows), min(made.columns_per_part, made.view.columns)
    steps = -(-rows // made.block_rows) * -(-columns // made.block_columns)
    assert steps <= 129


@pytest.mark.parametrize(
    "shape",
    [(131072, 37), (1 << 20, 32), (8192, 1024), (131072, 3), (131072, 100), (131072, 24), (131072, 65)],
    ids=str,
)
def test_rows_are_joined_so_that_vectors_fit_and_few_lanes_are_idle(shape):
    view, _ = view_of(torch.empty(shape, device="meta"))
    made = cut(view, sums=True)
    assert made.align >= 8
    assert made.tiles * made.block_columns <= 1.06 * made.view.columns
    assert made.view.rows * made.view.columns == shape[0] * shape[1]


def test_what_lies_otherwise_is_copied():
    x = torch.arange(120.0).view(2, 3, 4, 5)
    transposed = x.transpose(0, 3)
    view, copied = view_of(transposed)
    assert torch.equal(copied, transposed)
    assert copied.is_contiguous()
    assert view.columns == transposed.size(1) * 4 * 2
    dy = torch.ones(()).expand(x.shape)
    assert like(dy, x).stride() == x.stride()
    assert like(x, x) is x
    gaps = torch.zeros(2, 5, 40, 40)[:, :3]
    view, same = view_of(gaps)
    assert same is gaps
    assert (view.planes, view.x_row, view.x_channel, view.row) == (True, 8000, 1600, 4800)
