"""Fault 8: the padding of sequences of unlike lengths is measured as if it were data."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..finding import Finding
from ..layer import Layer, drift
from ..measured import Measured
from .rule import Rule

SHARE = 0.05  # of the positions
MEAN, VAR = 0.1, 0.1  # what the padding moves: standard deviations, |log ratio|


class Padding(Rule):
    name = "padding"

    def of_measured(self, layer: Layer, measured: Measured) -> Iterator[Finding]:
        if not measured.batches or measured.padded < SHARE or measured.unpadded is None:
            return
        eps = layer.eps
        shift, ratio = drift(measured.mean, measured.var, *measured.unpadded, eps)
        if shift > MEAN or ratio > VAR:
            yield self.found(
                layer.name,
                "warning",
                "{padded:.0%} of the positions repeat the end of their sequence, as padding does; without them the "
                "mean would change by {shift:.2g} standard deviations, the variance by a factor of {factor:.3g}",
                "bn.convert(model)\ny = {layer}(x, mask=mask)  # where the model calls it: True where there are data",
                confidence=0.8,
                padded=measured.padded,
                shift=shift,
                factor=float(np.exp(ratio)),
            )
