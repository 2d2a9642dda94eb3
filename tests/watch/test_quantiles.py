"""The nine columns against NumPy's quantiles, row by row, in float64."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from batchnorm.watch.quantiles import summarize


def one_row(row):
    """The definition, for one row."""
    finite = row[np.isfinite(row)].astype(np.float64)
    if len(finite) == 0:
        return [*[np.nan] * 8, len(row)]
    quantiles = [np.quantile(finite, level) for level in (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1)]
    return [*quantiles, finite.mean(), len(row) - len(finite)]


@pytest.mark.parametrize("channels", [1, 2, 3, 20, 21, 100, 257])
@pytest.mark.parametrize("scale", [1e-38, 1.0, 1e37])
def test_finite_rows(channels, scale):
    values = (np.random.default_rng(channels).standard_normal((4, 5, channels)) * scale).astype(np.float32)
    expected = np.array([[one_row(row) for row in block] for block in values])
    # Both interpolate in float64 and differ by the order of two roundings there; the result is rounded to float32
    # (2^-24 relative), and subnormal results to multiples of 2^-149.
    np.testing.assert_allclose(summarize(values), expected, rtol=2**-23, atol=2**-148)


floats = st.floats(width=32, allow_nan=True, allow_infinity=True)


@given(arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 9)), elements=floats))
def test_rows_with_anything_in_them(values):
    found = summarize(values)
    expected = np.array([one_row(row) for row in values])
    # A mean of numbers up to M cancels at worst to an error of a few 2^-53 M, which is far below 2^-23 M.
    largest = np.max(np.abs(values), initial=0, where=np.isfinite(values))
    np.testing.assert_allclose(found, expected, rtol=2**-23, atol=float(largest) * 2**-40 + 2**-148)
    np.testing.assert_array_equal(found[:, 8], [np.sum(~np.isfinite(row)) for row in values])
