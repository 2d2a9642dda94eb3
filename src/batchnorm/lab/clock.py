"""When a training ends, and after which of its steps the network is tested."""

from __future__ import annotations

from dataclasses import dataclass

MOST_TESTS = 100


@dataclass(frozen=True)
class Clock:
    """A training in steps.

    Attributes:
        steps: of the whole training.
        epoch_steps: steps in which every sample is seen once.
        interval: steps from one test to the next; the last step is followed by a test too.

    Example:
        >>> clock = Clock.of(epochs=None, steps=250, epoch_steps=24)
        >>> clock.interval, clock.tests(7), clock.tests(250)[-2:]
        (3, [3, 6], [249, 250])
    """

    steps: int
    epoch_steps: int
    interval: int

    @classmethod
    def of(cls, epochs: int | None, steps: int | None, epoch_steps: int) -> Clock:
        """By epochs the network is tested after each; by steps up to a hundred times, at equal distances."""
        if steps is not None:
            return cls(steps, epoch_steps, -(-steps // MOST_TESTS))
        return cls((epochs or 1) * epoch_steps, epoch_steps, epoch_steps)

    @property
    def epochs(self) -> int:
        """Epochs, the last of which may be cut short."""
        return -(-self.steps // self.epoch_steps)

    def is_test(self, step: int) -> bool:
        """Whether a test follows that step."""
        return step % self.interval == 0 or step == self.steps

    def tests(self, step: int) -> list[int]:
        """The steps up to this one that a test followed."""
        due = list(range(self.interval, step + 1, self.interval))
        return due if step < self.steps or step % self.interval == 0 else [*due, step]

    def since_test(self, step: int) -> int:
        """Steps up to this one, itself included, after the test before it."""
        return (step - 1) % self.interval + 1
