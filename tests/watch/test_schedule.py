"""The schedule of whole vectors: dense at first, thin later, within the budget, the same after a resume."""

from itertools import pairwise

import pytest

from batchnorm.watch.schedule import Schedule

DEFAULT_BUDGET = 128 << 20


def frame_bytes(layers, channels):
    return 20 + layers * channels * 8 * 4


def test_small_models_keep_every_early_step():
    schedule = Schedule.within(DEFAULT_BUDGET, frame_bytes(3, 100))
    assert schedule is not None
    assert all(schedule.keeps(step) for step in range(1500))


@pytest.mark.parametrize("size", [frame_bytes(3, 100), frame_bytes(53, 501), 10**6, 128 << 20])
def test_budget_is_kept(size):
    schedule = Schedule.within(DEFAULT_BUDGET, size)
    assert schedule is not None
    kept = sum(schedule.keeps(step) for step in range(200_000))
    assert 0 < kept * size <= max(DEFAULT_BUDGET, 19 * size)  # one frame an octave at the very least
    if schedule.dense > 1:
        denser = Schedule(schedule.dense + 1)  # the budget is also used: a denser one breaks it at ten million steps
        assert _kept_below_ten_million(schedule) * size <= DEFAULT_BUDGET
        assert _kept_below_ten_million(denser) * size > DEFAULT_BUDGET * 0.95


def _kept_below_ten_million(schedule):
    """Counted interval by interval: [0, 2d) all, then d in every doubling, the last one cut."""
    total, low, stride = min(10**7, 2 * schedule.dense), 2 * schedule.dense, 2
    while low < 10**7:
        high = min(2 * low, 10**7)
        total += len(range(-(-low // stride) * stride, high, stride))
        low, stride = 2 * low, 2 * stride
    return total


def test_the_count_by_intervals_is_that_of_keeps():
    schedule = Schedule(7)
    assert _kept_below_ten_million(schedule) - sum(schedule.keeps(i) for i in range(10**5)) == sum(
        len([i for i in range(-(-low // s) * s, min(2 * low, 10**7), s) if i >= 10**5])
        for s, low in ((2**k, 14 * 2 ** (k - 1)) for k in range(1, 24))
        if low < 10**7 and 2 * low > 10**5
    )


def test_gaps_never_shrink_and_start_at_one():
    schedule = Schedule(5)
    kept = [i for i in range(5000) if schedule.keeps(i)]
    gaps = [b - a for a, b in pairwise(kept)]
    assert kept[:10] == list(range(10))
    assert gaps == sorted(gaps)


def test_no_budget_keeps_nothing():
    assert Schedule.within(0, 100) is None
    assert Schedule.within(99, 100) is None
