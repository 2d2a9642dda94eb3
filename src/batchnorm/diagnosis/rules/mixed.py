"""Fault 10: batches come from several populations, so that the running statistics are those of none of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from ..finding import Finding
from ..history import History
from ..layer import Array, Layer
from ..measured import Measured
from .rule import Rule

LEAST = 8  # batches
DISPERSION = 4.0  # variance of the batch means beside that of batches drawn at random, which is 1
SPLIT = 0.9  # of the variance of the batch means lies between two clusters; of a normal distribution 0.64 does
DISTANCE = 0.3  # between the clusters, in standard deviations
# Variance of the batch means beside that of neighbors, which of T shuffled batches is 1 with a standard deviation of
# 1 / sqrt(T): so many of these above; and the standard deviation of the batch means.
ORDER, APART, FAR_APART = 4.5, 0.1, 0.5
REMEDY = (
    "loader = torch.utils.data.DataLoader(dataset, batch_size, shuffle=True)  # each batch of all populations; or a "
    "batch-norm layer for each"
)


class Mixed(Rule):
    name = "mixed-populations"

    def of_run(self, history: History) -> Iterator[Finding]:
        order = history.order
        if history is history.first and order is not None and unshuffled(history):
            yield self.found(
                history.info.name,
                "serious" if order.spread > FAR_APART else "warning",
                "over the last {steps} recorded steps the batch means vary {ratio:.3g} times as much as from one step "
                "to the next, by {spread:.2g} standard deviations: the data are not shuffled (sorted by label?), and "
                "the running statistics are those of the last batches",
                REMEDY,
                confidence=0.8,
                steps=order.steps,
                ratio=order.ratio,
                spread=order.spread,
            )
            return
        steps, means = history.run.probes(history.info.name, "batch_mean")
        _, variances = history.run.probes(history.info.name, "batch_var")
        if len(steps) and np.isfinite(means[-1]).all() and np.isfinite(variances[-1]).all():
            where, mean, var = f"probed at step {steps[-1]:,}", means[-1], variances[-1]
        elif history.recent is not None:
            where, (mean, var, _) = f"of the last {len(history.recent[0])} recorded steps", history.recent
        else:
            return
        mean, var, eps = mean.astype(np.float64), var.astype(np.float64), history.info.eps
        yield from self._split(history.info.name, mean, var, eps, f"the batches {where}", 0.7, {})

    def of_measured(self, layer: Layer, measured: Measured) -> Iterator[Finding]:
        dispersion = dispersed(measured)
        if dispersion < DISPERSION:
            return
        eps = layer.eps
        found = list(
            self._split(
                layer.name,
                measured.means,
                measured.variances,
                eps,
                f"{measured.batches} batches",
                0.9,
                {"dispersion": dispersion},
            )
        )
        yield from found
        spread = float(np.sqrt((measured.means.var(0) / (measured.var + layer.eps)).mean()))
        if not found:
            yield self.found(
                layer.name,
                "warning" if spread > DISTANCE else "note",
                "the batch means vary {dispersion:.3g} times as much as those of batches drawn at random would, by "
                "{spread:.2g} standard deviations: the data are not shuffled",
                REMEDY,
                confidence=0.8,
                dispersion=dispersion,
                spread=spread,
            )

    def _split(
        self,
        name: str,
        means: Array,
        variances: Array,
        eps: float,
        what: str,
        confidence: float,
        facts: dict[str, Any],
    ) -> Iterator[Finding]:
        if len(means) < LEAST:
            return
        one, share = two_clusters((means - means.mean(0)) / np.sqrt(variances.mean(0) + eps))
        other = ~one
        if min(one.sum(), other.sum()) < 2:
            return
        difference = (means[one].mean(0) - means[other].mean(0)) ** 2 / (variances.mean(0) + eps)
        distance = float(np.sqrt(difference.mean()))
        if share > SPLIT and distance > DISTANCE:
            yield self.found(
                name,
                "warning",
                f"{what} fall into two groups of {{one}} and {{other}}: the means are {{distance:.2g}} standard "
                "deviations apart, and {share:.0%} of the variance of the batch means lies between the two",
                REMEDY,
                confidence=confidence,
                one=int(one.sum()),
                other=int(other.sum()),
                distance=distance,
                share=share,
                **facts,
            )


def unshuffled(history: History) -> bool:
    """Whether the batches of a run come in an order, as the layer nearest to the data shows: it drifts least itself."""
    order = history.first.order
    return order is not None and order.ratio > 1 + ORDER / order.steps**0.5 and order.spread > APART


def not_random(measured: Measured) -> bool:
    """Whether the batches are not drawn at random."""
    return dispersed(measured) >= DISPERSION


def dispersed(measured: Measured) -> float:
    """Variance of the batch means beside that of batches drawn at random; 0 where nobody can tell."""
    within = measured.within
    if measured.batches < LEAST or within is None or not np.isfinite(within).all() or not (within > 0).any():
        return 0.0
    varies = within > 0
    expected = within[varies] / measured.samples[:, None]
    square = (measured.means - measured.mean)[:, varies] ** 2 / expected
    return float(square.sum() / (measured.batches - 1) / varies.sum())


def two_clusters(points: Array) -> tuple[np.ndarray, float]:
    """The best cut of points, (B, C), in two along their first principal component.

    Returns:
        Which points lie below the cut, (B,) bool, and the share of the variance along it that is between the two parts.
    """
    if len(points) <= points.shape[1]:  # the smaller of the two squares has the same first component, and is soon found
        along = np.linalg.eigh(points @ points.T)[1][:, -1]
    else:
        along = points @ np.linalg.eigh(points.T @ points)[1][:, -1]
    order = np.argsort(along)
    ordered = along[order] - along.mean()
    total = float((ordered**2).sum())
    below = np.arange(1, len(along))
    sums = np.cumsum(ordered)[:-1]
    between = sums**2 / below + sums**2 / (len(along) - below)
    best = int(between.argmax())
    part = np.zeros(len(along), bool)
    part[order[: best + 1]] = True
    return part, float(between[best] / total) if total > 0 else 0.0
