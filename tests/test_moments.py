"""Moments against float64 definitions: measuring, masking, and merging however the samples are cut."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from batchnorm import Moments

SHAPES = [(7, 3), (4, 3, 5), (2, 3, 4, 5), (2, 3, 2, 3, 4)]


def definition(x, mask=None):
    """Count, mean and m2 by numbers in a list: another implementation."""
    columns = x.double().movedim(1, 0).flatten(1)
    if mask is not None:
        keep = mask.expand(x.size(0), *x.shape[2:]).flatten()
        columns = columns[:, keep]
    mean = columns.mean(1)
    return columns.size(1), mean, (columns - mean[:, None]).square().sum(1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mean", [0.0, 1e6])
def test_measure(shape, mean):
    x = torch.randn(shape) + mean
    count, expected_mean, m2 = definition(x)
    moments = Moments.measure(x)
    assert moments.count.item() == count
    assert moments.count.dtype == torch.int64
    # float64 sums of float32 values: a few ulp of the sum.
    torch.testing.assert_close(moments.mean, expected_mean, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(moments.m2, m2, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_what_lies_under_the_mask_does_not_count(shape):
    x = torch.randn(shape)
    mask = torch.rand(shape[0], *shape[2:]) < 0.6
    mask[0] = True
    dirty = torch.where(mask.unsqueeze(1), x, torch.nan)
    count, mean, m2 = definition(x, mask)
    moments = Moments.measure(dirty, mask)
    assert moments.count.item() == count
    torch.testing.assert_close(moments.mean, mean, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(moments.m2, m2, rtol=1e-12, atol=1e-12)


def test_a_mask_broadcasts_from_the_right():
    x = torch.randn(4, 3, 5)
    mask = torch.tensor([True, False, True, True, False])
    count, mean, m2 = definition(x, mask)
    moments = Moments.measure(x, mask)
    assert moments.count.item() == count == 12
    torch.testing.assert_close(moments.mean, mean)
    torch.testing.assert_close(moments.m2, m2)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.sampled_from([0.0, 1e4, -1e6]), st.integers(0, 999))
def test_merging_any_cut_gives_the_moments_of_the_whole(sizes, mean, seed):
    x = torch.randn(sum(sizes) + 1, 2, generator=torch.Generator().manual_seed(seed)) + mean
    whole = Moments.measure(x)
    parts = [Moments.measure(part) for part in x.split([*sizes, 1])]
    merged = Moments.empty(2).merge(*parts)
    assert merged.count.equal(whole.count)
    # Each merge rounds once in float64; m2 sees the mean's rounding squared, times the count.
    torch.testing.assert_close(merged.mean, whole.mean, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(merged.m2, whole.m2, rtol=1e-9, atol=1e-9)


def test_empty_is_the_identity_even_beside_infinity():
    x = torch.tensor([[1.0, float("inf")], [2.0, 1.0]])
    measured = Moments.measure(x)
    for merged in (Moments.empty(2).merge(measured), measured.merge(Moments.empty(2))):
        assert merged.count.equal(measured.count)
        torch.testing.assert_close(merged.mean, measured.mean, equal_nan=True)
        torch.testing.assert_close(merged.m2, measured.m2, equal_nan=True)


def test_variance_has_two_estimators_and_neither_where_values_are_too_few():
    x = torch.randn(5, 3)
    moments = Moments.measure(x)
    torch.testing.assert_close(moments.variance(), x.double().var(0, unbiased=False))
    torch.testing.assert_close(moments.variance(unbiased=True), x.double().var(0, unbiased=True))
    assert Moments.measure(x[:1]).variance(unbiased=True).isnan().all()
    assert Moments.measure(x[:1]).variance().eq(0).all()
    assert Moments.empty(3).variance().isnan().all()


def test_measuring_is_differentiable():
    x = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: (Moments.measure(t).mean, Moments.measure(t).m2), (x,))


@pytest.mark.parametrize(
    ("mask", "message"),
    [(torch.ones(4, 5), "bool"), (torch.ones(4, 4, dtype=torch.bool), "broadcasts")],
)
def test_a_mask_that_does_not_fit_is_refused(mask, message):
    with pytest.raises(ValueError, match=message):
        Moments.measure(torch.randn(4, 3, 5), mask)


def test_a_vector_has_no_channels():
    with pytest.raises(ValueError, match="at least 2 dimensions"):
        Moments.measure(torch.randn(4))


def test_moments_of_other_channels_do_not_merge():
    with pytest.raises(ValueError, match="1 channels with moments of 3"):
        Moments.empty(1).merge(Moments.empty(3))
