"""Which recorded steps keep whole vectors: all at first, then ever fewer, under a budget of bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass

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
