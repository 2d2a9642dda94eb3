"""Every value is walked once, by the program of its channel: views and cuts, without a kernel."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._prims_common import suggest_memory_format

from batchnorm.ops.gpu.cut import cut
from batchnorm.ops.gpu.layout import format_of, is_too_long, like, outline, view_of

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


@pytest.mark.slow
@settings(deadline=None, max_examples=300)
@given(data=st.data(), dims=st.integers(2, 5))
def test_any_strides_are_walked_where_their_values_lie(data, dims):
    """Permuted dimensions, gaps, expanded ones, and dimensions of 1, whose strides mean nothing."""
    shape = tuple(data.draw(st.lists(st.integers(1, 4), min_size=dims, max_size=dims)))
    strides, following = [0] * dims, 1
    for dim in data.draw(st.permutations(range(dims))):
        odd = data.draw(st.sampled_from([None] * 4 + [0] + ([7] if shape[dim] == 1 else [])))
        strides[dim] = following if odd is None else odd
        following = following * shape[dim] + data.draw(st.sampled_from([0] * 4 + [8]))
    x = torch.arange(1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))).as_strided(shape, strides)
    view, copied = view_of(x)
    assert outline(x) == view
    memory_format = suggest_memory_format(x)
    assert format_of(x) is memory_format
    written = torch.empty_like(x, memory_format=memory_format)
    samples, channels = shape[:2]
    for tensor, row, channel in ((copied, view.x_row, view.x_channel), (written, view.row, view.channel)):
        size = view.columns if view.planes or view.inner > 1 else channels
        rows = torch.arange(view.rows)[:, None] * row + torch.arange(size)
        if view.planes:
            offsets = (torch.arange(channels)[:, None, None] * channel + rows).transpose(0, 1)
        elif view.inner > 1:
            offsets = rows
        else:
            offsets = rows.view(samples, -1, channels).transpose(1, 2)
        steps = [torch.arange(n) * s for n, s in zip(shape, tensor.stride(), strict=True)]
        by_strides = sum(each.view([-1 if i == d else 1 for i in range(dims)]) for d, each in enumerate(steps))
        assert torch.equal(by_strides.reshape(samples, channels, -1), offsets.reshape(samples, channels, -1))


@pytest.mark.parametrize(
    ("shape", "too_long"),
    [
        ((1, 1, 1 << 31), True),
        ((1 << 25, 64), False),
        ((1, 64, 1 << 27), False),
        ((1, 1 << 31), True),
        ((1, 1 << 29, 2, 2), True),
    ],
    ids=str,
)
def test_rows_too_long_for_32_bits(shape, too_long):
    assert is_too_long(torch.empty(shape, device="meta")) is too_long
