"""The comparison itself can fail: each way in which two tensors differ is caught."""

import pytest
import torch
from compare import assert_close


@pytest.mark.parametrize(
    ("ours", "exact"),
    [
        ([1.0, 2.0], [1.0, 2.00001]),
        ([1.0, float("nan")], [1.0, 2.0]),
        ([1.0, 2.0], [1.0, float("nan")]),
        ([1.0, float("inf")], [1.0, -float("inf")]),
        ([1.0], [1.0, 1.0]),
    ],
)
def test_a_difference_fails(ours, exact):
    with pytest.raises(AssertionError):
        assert_close(torch.tensor(ours), torch.tensor(exact, dtype=torch.float64))


def test_a_worse_error_than_twice_the_peers_fails():
    exact = torch.zeros(3, dtype=torch.float64)
    peer = torch.full((3,), 1e-3)
    assert_close(torch.full((3,), 1.9e-3), exact, peer=peer)
    with pytest.raises(AssertionError, match="largest error"):
        assert_close(torch.full((3,), 2.1e-3), exact, peer=peer)


def test_rounding_passes():
    exact = torch.tensor([1 / 3, float("nan"), float("inf")], dtype=torch.float64)
    assert_close(exact.float(), exact)
    assert_close(exact.bfloat16(), exact)
