"""Lint: channels whose output is constant whatever comes in."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ...view.facts import BELOW, NEAR_ZERO
from ..finding import Finding
from ..layer import Layer
from .rule import Rule

MANY = 0.5


class Dead(Rule):
    name = "dead-channels"

    def of_layer(self, layer: Layer) -> Iterator[Finding]:
        gamma, beta = layer.gamma, layer.beta
        if gamma is None or not np.isfinite(gamma).all() or layer.is_plain or layer.is_new:  # as it may begin: 0
            return
        scale = np.abs(gamma)
        zero = scale < NEAR_ZERO
        rectified = layer.place.rectified if layer.place else None
        shut = np.zeros_like(zero)
        if beta is not None and rectified is not False:
            shut = ~zero & (beta < -BELOW * scale)
        share = float((zero | shut).mean())
        if not share:
            return
        said = [f"{int(zero.sum())} have |gamma| below {NEAR_ZERO:g}"] if zero.any() else []
        if shut.any():
            relu = "the ReLU after it" if rectified else "a ReLU, if one comes after it,"
            said.append(
                f"{int(shut.sum())} have beta below -{BELOW:g} |gamma|, so that {relu} lets next to nothing through"
            )
        yield self.found(
            layer.name,
            "warning" if share > MANY else "note",
            "{share:.0%} of {channels} channels are dead: " + "; ".join(said),
            "print({layer}.weight.abs().argsort())  # prune the first of these, or lower the weight decay",
            confidence=1.0 if rectified or not shut.any() else 0.5,
            share=share,
            channels=layer.channels,
            zero=int(zero.sum()),
            shut=int(shut.sum()),
        )
