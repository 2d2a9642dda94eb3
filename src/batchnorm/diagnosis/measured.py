"""Measured: what several batches measure in a layer at the same weights, in NumPy."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .layer import Array

Counts = NDArray[np.int64]


class Inputs(NamedTuple):
    """How the data compare with those of the training, as the layer nearest to them tells.

    Attributes:
        scale: how many times as large they are; None where they are not, or nobody can tell.
        moved: whether that layer measures something else than it tracked.
    """

    scale: float | None = None
    moved: bool = False


@dataclass(frozen=True)
class Measured:
    """B forwards of a layer, of at least two values a channel each.

    Attributes:
        counts: values a channel in each, (B,).
        samples: items in each, (B,): N of (N, C, *).
        means, variances: of each, (B, C); the variance is the biased one.
        within: variance of the items' own means within a batch, pooled over the batches, (C,); None with one item each.
        shape: of the first input, channels second.
        calls: how often one call of the model runs the layer.
        updates: how often one step, with its backward where a loss was given, updates the running statistics.
        lonely: how many batches have a single value a channel, which cannot be trained on.
        remainder: items in the last batch of a DataLoader; None where nobody can tell.
        features_from: the module that the input comes from, if that has its features in another dimension.
        padded: share of the positions that are a repeated tail of their sequence; 0 where it cannot be told.
        unpadded: mean and variance without these, (C,).
        order: 0 of the layer that ran first, 1 of the next.
        inputs: how the data compare with those of the training.
    """

    counts: Counts
    samples: Counts
    means: Array
    variances: Array
    within: Array | None
    shape: tuple[int, ...]
    calls: int = 1
    updates: int = 1
    lonely: int = 0
    remainder: int | None = None
    features_from: str | None = None
    padded: float = 0.0
    unpadded: tuple[Array, Array] | None = None
    order: int = 0
    inputs: Inputs = field(default_factory=Inputs)

    @property
    def batches(self) -> int:
        """B."""
        return len(self.counts)

    @cached_property
    def mean(self) -> Array:
        """Of the union of all batches."""
        return np.average(self.means, axis=0, weights=self.counts)

    @cached_property
    def var(self) -> Array:
        """Of the union of all batches, biased: what lies within them, and what between their means."""
        spread = (self.means - self.mean) ** 2
        return np.average(self.variances + spread, axis=0, weights=self.counts)
