"""Synchronized layers on torch's own operators: what they run, and what they leave alone where there is no variance.

Their values are tested by the suite of tests/nn/test_sync*.py, which test_native_suite.py runs on these operators.
"""

import native_forced
import pytest
import ranks
import torch
from counting import Passes

import batchnorm as bn
from batchnorm.ops import native_sync


def passes_of_a_step(rank):
    native_forced.force()
    found = {}
    for name, items in (("all", 2), ("first empty", 2 * rank)):
        layer, x = bn.SyncBatchNorm(4, activation="relu"), torch.randn(items, 4, 8, 8).requires_grad_()
        size, counted = max(x.numel(), 4 * 8 * 8), {}
        with ranks.counting(counted):
            with Passes(size) as forward:
                y = layer(x, torch.ones_like(x))
            with Passes(size) as backward:
                y.sum().backward()
        made = {str(dtype) for dtype in forward.made | backward.made}
        found[name] = forward.operators, backward.operators, made, counted
    return found


@pytest.mark.processes
def test_one_pass_to_measure_one_to_normalize_and_one_collective_each_way():
    for rank, found in enumerate(ranks.run(passes_of_a_step, 2)):
        for name, (forward, backward, made, counted) in found.items():
            assert sum(counted.values()) == 2
            if (rank, name) == (0, "first empty"):
                assert (forward, backward) == ([], [])
                continue
            # To merge takes x for its dtype, and does not read it.
            merged = "batch_norm_gather_stats_with_counts"
            assert forward == ["ones_like", "batch_norm_stats", merged, "batch_norm_elemt", "add_", "relu", "sum"][:-1]
            assert [name for name in backward if "batch_norm" in name or "threshold" in name] == [
                "threshold_backward",
                "batch_norm_backward_reduce",
                "batch_norm_backward_elemt",
            ]
            assert made == {"torch.float32"}


@pytest.fixture(scope="module")
def operators():
    """torch's operators have kernels for the CPU."""
    if not native_forced._kept:
        native_forced.register()


@pytest.mark.parametrize("counts", [[0, 0, 0], [0, 1, 0], [0, 4, 0, 3], [5, 0, 2]])
@pytest.mark.parametrize("mine", range(3))
def test_what_has_no_samples_is_the_identity(counts, mine, operators):
    """On every rank the same bits, whether it has samples itself or not."""
    batches = [torch.randn(count, 3) + 10 for count in counts]
    rows = native_sync.Rows(
        torch.stack([batch.mean(0) if len(batch) else torch.zeros(3) for batch in batches]),
        torch.stack(
            [
                torch.rsqrt((batch.var(0, correction=0) if len(batch) else 0) + torch.full((3,), 1e-5))
                for batch in batches
            ]
        ),
        torch.tensor(counts, dtype=torch.float32),
    )
    running = torch.full((3,), 2.0), torch.full((3,), 3.0)
    measured = native_sync.merge(batches[mine], rows, 1e-5, *running, 0.5)
    count, mean, m2 = measured.statistics()
    whole = torch.cat(batches).double()
    assert count.tolist() == [len(whole)] * 3
    expected = bn.Moments.measure(whole)
    # float32, around a mean of 10: an ulp is 1e-6, of m2 some of the variance's, whose size is 1.
    torch.testing.assert_close(mean, expected.mean, rtol=0, atol=5e-6)
    torch.testing.assert_close(m2, expected.m2, rtol=1e-5, atol=1e-5)
    moved = 2 + 0.5 * (expected.mean - 2) if len(whole) else torch.full((3,), 2.0, dtype=torch.float64)
    torch.testing.assert_close(running[0].double(), moved, rtol=0, atol=5e-6)
    if len(whole) > 1:
        torch.testing.assert_close(running[1].double(), 3 + 0.5 * (expected.variance(True) - 3), rtol=1e-5, atol=0)
    else:
        assert running[1].eq(3).all()
