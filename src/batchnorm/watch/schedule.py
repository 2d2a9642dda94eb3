"""Which steps are recorded, and which records keep whole vectors: by number, or under a budget of time, or of bytes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

# The share of the training's time that every="auto" lets recording cost, as far as it can be measured: clocks
# in hooks do not see the time that torch takes to call them.
MEASURED_SHARE = 0.01
# As often it records all the same: what cannot be kept under the budget is at least seldom.
_AUTO_AT_LEAST = 1000
# Recorded steps that the budget is made to last for; beyond, every doubling of them adds `dense` frames.
_HORIZON = 10**7


@dataclass(frozen=True)
class Schedule:
    """Keeps every record below 2 * dense, every 2nd up to 4 * dense, every 4th up to 8 * dense, and so on.

    Whether a record is kept follows from its index alone: a resumed run keeps what an uninterrupted one keeps.

    Example:
        >>> schedule = Schedule(dense=2)
        >>> [i for i in range(20) if schedule.keeps(i)]
        [0, 1, 2, 3, 4, 6, 8, 12, 16]
    """

    dense: int

    def keeps(self, index: int) -> bool:
        """Whether the record of this index (0-based) keeps its vectors."""
        doublings = max(0, (index // self.dense).bit_length() - 1)
        return index % (1 << doublings) == 0

    @classmethod
    def within(cls, budget_bytes: int, frame_bytes: int) -> Schedule | None:
        """The densest schedule that keeps ten million records within the budget; None if a frame exceeds it."""
        frames = budget_bytes // frame_bytes
        if frames < 1:
            return None
        low, high = 1, _HORIZON  # largest dense with dense * (1 + log2(horizon / dense)) <= frames
        while low < high:
            middle = (low + high + 1) // 2
            if middle * (1 + math.log2(_HORIZON / middle)) <= frames:
                low = middle
            else:
                high = middle - 1
        return cls(low)


class Plan(Protocol):
    """Which steps are recorded. Asked once for each step, as it begins."""

    comes_off: bool  # whether hooks are to be gone in between

    def index(self, step: int) -> int | None:
        """The number of the step's record among all records; None where it is not recorded."""
        ...


class EveryKth:
    """Every k-th step: a resumed run records what an uninterrupted one records."""

    comes_off = False

    def __init__(self, every: int) -> None:
        self._every = every

    def index(self, step: int) -> int | None:
        return None if step % self._every else step // self._every


class WithinShare:
    """Records as many steps as fit into a share of the elapsed time.

    The cost of recording is a debt, which that share of the elapsed time pays off. Once it is paid off, the next step
    is recorded. Credit does not accumulate: no burst of records follows a pause such as an evaluation.

    Args:
        share: of the time.
        records: how many there are already.
        spent: the seconds that recording has cost so far, asked as a step begins.
        clock: seconds.
    """

    comes_off = True

    def __init__(
        self, share: float, records: int, spent: Callable[[], float], clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._share, self._records, self._spent, self._clock = share, records, spent, clock
        self._debt = self._paid = 0.0
        self._begin = clock()
        self._left_out = _AUTO_AT_LEAST  # the first step is recorded

    def index(self, step: int) -> int | None:
        now, spent = self._clock(), self._spent()
        self._debt = max(0.0, self._debt + (spent - self._paid) - self._share * (now - self._begin))
        self._begin, self._paid = now, spent
        if self._debt > 0 and self._left_out < _AUTO_AT_LEAST:
            self._left_out += 1
            return None
        self._left_out = 1
        self._records += 1
        return self._records - 1
