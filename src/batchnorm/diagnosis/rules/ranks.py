"""Fault 7: copies of a layer that ought to be the same have other running statistics, or other gamma and beta."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from ..finding import Finding
from ..layer import Layer, drift
from .rule import Rule

MEAN_SERIOUS, VAR_SERIOUS = 0.25, 0.35  # standard deviations, |log ratio|
SAME = 1e-6


class Ranks(Rule):
    name = "ranks-disagree"

    def of_copies(self, copies: Sequence[Layer]) -> Iterator[Finding]:
        first, name = copies[0], copies[0].name
        learned = max(_largest(first, other, ("gamma", "beta")) for other in copies[1:])
        if learned > SAME:
            # Runs are of ranks or of trainings that have nothing to do with each other; the rest is compared as copies.
            runs = first.step is not None
            yield self.found(
                name,
                "note" if runs else "serious",
                "gamma and beta differ by up to {learned:.3g} between {copies} copies: "
                + ("another training each, or " if runs else "")
                + "replicas that are no longer one model",
                "model = torch.nn.parallel.DistributedDataParallel(model)  # on all ranks, from one checkpoint",
                learned=learned,
                copies=len(copies),
            )
            return
        mean_drift = log_ratio = 0.0
        eps = first.eps
        pairs = [(copy.running_mean, copy.running_var) for copy in copies]
        tracked = [(mean, var) for mean, var in pairs if mean is not None and var is not None]
        for mean, var in tracked[1:]:
            there = drift(*tracked[0], mean, var, eps)
            mean_drift, log_ratio = max(mean_drift, there[0]), max(log_ratio, there[1])
        if max(mean_drift, log_ratio) > SAME:
            yield self.found(
                name,
                "serious" if mean_drift > MEAN_SERIOUS or log_ratio > VAR_SERIOUS else "warning",
                "gamma and beta are the same in {copies} copies, but the running means differ by {mean_drift:.2g} "
                "standard deviations, the variances by a factor of {var_factor:.3g}: ranks evaluate different models",
                "bn.pool_buffers(model)  # on all ranks, which then agree; changes what eval mode computes",
                copies=len(copies),
                mean_drift=mean_drift,
                var_factor=float(np.exp(log_ratio)),
            )


def _largest(one: Layer, other: Layer, quantities: tuple[str, ...]) -> float:
    """The largest difference in these; NaN differs from everything but is another rule's, so it counts as none."""
    largest = 0.0
    for quantity in quantities:
        a, b = getattr(one, quantity), getattr(other, quantity)
        if a is not None and b is not None:
            largest = max(largest, float(np.nanmax(np.abs(a - b), initial=0.0)))
    return largest
