"""The data that are evaluated are not prepared as those of the training: 0..255 for 0..1, or not normalized."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from ..finding import Finding
from ..layer import Array, Layer, drift
from ..measured import Inputs, Measured
from .rule import RECALIBRATE, Rule

# Log of how many times as large the variance is in the layer nearest to the data, the median of its channels; and how
# far the channels may be apart in it, as a share of that: another scale of the inputs is the same for all.
RATIO, APART = math.log(3), 0.25
MEAN, VAR = 0.5, 0.7  # as serious as `unconverged`: standard deviations, |log ratio|
CHECK = "# prepare the batches like the training data: the same range (x / 255?), then the same mean and std"
CHECK_FIRST = f"{CHECK}\n# only if they are:\n{RECALIBRATE}"


class Preprocessing(Rule):
    name = "preprocessing"

    def of_measured(self, layer: Layer, measured: Measured) -> Iterator[Finding]:
        scale = measured.inputs.scale
        if measured.order == 0 and scale is not None:
            yield self.found(
                layer.name,
                "serious",
                "in the layer nearest to the data, the batches have {factor:.3g} times the tracked variance, "
                "in all channels alike: the inputs are {scale:.3g} times as large as the training inputs. "
                "Recalibrating would fit the model to wrongly prepared data",
                CHECK,
                confidence=0.9,
                scale=scale,
                factor=scale**2,
            )


def inputs_of(layer: Layer, measured: Measured) -> Inputs:
    """How the data compare with those that the layer tracked, which is the one that ran first."""
    mean, var = layer.running_mean, layer.running_var
    if mean is None or var is None or not measured.batches or layer.is_fresh or not np.isfinite(var).all():
        return Inputs()
    if layer.updates is not None and layer.momentum is not None and (1 - layer.momentum) ** layer.updates > 0.01:
        return Inputs()  # much of it is the initial 0 and 1
    shift, log_ratio = drift(mean, var, measured.mean, measured.var, layer.eps)
    return Inputs(_scale(var, measured.var, layer.eps), shift > MEAN or log_ratio > VAR)


def _scale(var: Array, measured: Array, eps: float) -> float | None:
    """By which factor all channels' standard deviations differ, if it is one for all, and large."""
    kept = (var > eps) & (measured > eps)
    if kept.mean() < 0.5:
        return None
    ratios = np.log(measured[kept] / var[kept])
    ratio = float(np.median(ratios))
    if abs(ratio) < RATIO or float(np.median(np.abs(ratios - ratio))) > APART * abs(ratio):
        return None
    return math.exp(ratio / 2)
