"""Faults 6 and lint: eps is no small addition to the variance, so that the layer does not normalize."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from ..finding import Finding
from ..layer import Layer
from .rule import Rule

# Where eps is a tenth of the variance, the output's standard deviation is 5 % less than |gamma|.
NEAR = 0.1
MANY = 0.5  # of the channels
LEAVE = (
    "# leave eps: a trained model computes with it, and another one changes the outputs; to normalize these channels, "
    "train again with a smaller eps or a larger input"
)


class SmallVariance(Rule):
    name = "small-variance"

    def of_layer(self, layer: Layer) -> Iterator[Finding]:
        var = layer.running_var
        if var is None or not (var >= 0).all():
            return
        eps = layer.eps
        constant, near = float((var <= eps).mean()), float((var * NEAR <= eps).mean())
        facts: dict[str, Any] = {"eps": eps, "constant": constant, "near": near, "median": float(np.median(var))}
        known, assumed = 1.0 if layer.settings else 0.6, layer.assumes("eps")
        if near > MANY:
            yield self.found(
                layer.name,
                "warning" if layer.settings else "note",
                "eps is {eps:g}, and the median running variance {median:.3g}: in {near:.0%} of the channels eps is "
                "more than a tenth of the variance, so their output is not normalized",
                LEAVE,
                confidence=0.8 * known,
                assumed=assumed,
                **facts,
            )
        elif constant:
            yield self.found(
                layer.name,
                "note",
                "{constant:.0%} of the channels have a running variance of at most eps, {eps:g}: they are constant, "
                "and their output is beta alone",
                f"print({{layer}}.running_var <= {eps:g})  # prune these, or fix the layer that feeds them",
                confidence=known,
                assumed=assumed,
                **facts,
            )
