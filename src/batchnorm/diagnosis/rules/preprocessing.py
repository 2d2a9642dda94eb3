"""The data that are evaluated are not prepared as those of the training: 0..255 for 0..1, or not normalized."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from ..finding import Finding
from ..layer import Layer
from ..measured import Measured
from .rule import Rule

# Log of how many times as large the variance is in the layer nearest to the data, the median of its channels; and how
# far the channels may be apart in it, as a share of that: another scale of the inputs is the same for all.
RATIO, APART = math.log(3), 0.25
CHECK = "# prepare the batches as those of the training: the same range (x / 255?), then the same mean and std"


class Preprocessing(Rule):
    name = "preprocessing"

    def of_measured(self, layer: Layer, measured: Measured) -> Iterator[Finding]:
        if measured.order == 0 and measured.rescaled is not None:
            yield self.found(
                layer.name,
                "serious",
                "what the batches measure in the layer nearest to the data has {factor:.3g} times the variance that it "
                "tracked, in all channels alike: the inputs are {scale:.3g} times as large as those of the training. "
                "Recalibrating would fit the model to data that are prepared otherwise",
                CHECK,
                confidence=0.9,
                scale=measured.rescaled,
                factor=measured.rescaled**2,
            )


def rescaled(layer: Layer, measured: Measured) -> float | None:
    """How many times as large the inputs are as those that the layer tracked; None if they are not, or nobody can tell.

    Args:
        layer: the one that ran first.
        measured: what batches measure in it.
    """
    var = layer.running_var
    if var is None or not measured.batches or layer.is_fresh or not np.isfinite(var).all():
        return None
    if layer.updates is not None and layer.momentum is not None and (1 - layer.momentum) ** layer.updates > 0.01:
        return None  # much of it is the initial 1
    kept = (var > layer.eps) & (measured.var > layer.eps)
    if kept.mean() < 0.5:
        return None
    ratios = np.log(measured.var[kept] / var[kept])
    ratio = float(np.median(ratios))
    if abs(ratio) < RATIO or float(np.median(np.abs(ratios - ratio))) > APART * abs(ratio):
        return None
    return math.exp(ratio / 2)
