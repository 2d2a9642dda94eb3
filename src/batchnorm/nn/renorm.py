"""Batch renormalization: limits on how far it may differ from normalization by the running statistics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Renorm:
    """Batch renormalization, for small or dissimilar batches: training normalizes as eval does, up to the given limits.

        xhat = (x - mean) / sigma * r + d
        r = clip(sigma / sigma_running, 1 / r_max, r_max)
        d = clip((mean - mean_running) / sigma_running, -d_max, d_max)

    r and d are held constant in backward. With r_max = 1 and d_max = 0 it is batch normalization; without limits,
    training normalizes as eval does.

    Args:
        r_max: the largest ratio, at least 1.
        d_max: the largest difference, in standard deviations, at least 0.
        schedule: a function from the number of tracked batches to (r_max, d_max), replacing the two. The paper starts
            with batch normalization and relaxes the limits, because the running statistics are meaningless at first.

    Raises:
        ValueError: r_max below 1 or d_max below 0.

    Source: Ioffe 2017, "Batch Renormalization", Algorithm 1.

    Example:
        >>> relaxed = Renorm(schedule=lambda n: (1 + 2 * min(n / 5000, 1), 5 * min(n / 5000, 1)))
        >>> layer = bn.BatchNorm1d(3, renorm=relaxed)
        >>> layer(torch.randn(8, 3)).shape
        torch.Size([8, 3])
    """

    r_max: float = 3.0
    d_max: float = 5.0
    schedule: Callable[[int], tuple[float, float]] | None = None

    def __post_init__(self) -> None:
        _check(self.r_max, self.d_max)

    def limits(self, batches: Tensor | None) -> tuple[float, float]:
        """(r_max, d_max) after so many batches; a schedule reads their number, and so waits for a GPU."""
        if self.schedule is None:
            return self.r_max, self.d_max
        r_max, d_max = self.schedule(0 if batches is None else int(batches))
        _check(r_max, d_max)
        return r_max, d_max


def _check(r_max: float, d_max: float) -> None:
    if not (r_max >= 1 and d_max >= 0):
        raise ValueError(f"renormalization needs r_max >= 1 and d_max >= 0, but got r_max={r_max}, d_max={d_max}")
