"""Lint: (N, L, C) given to a layer that normalizes dimension 1."""

from __future__ import annotations

from collections.abc import Iterator

from ..finding import Finding
from ..layer import Layer
from ..measured import Measured
from .rule import Rule, literal

REMEDY = "layer = bn.BatchNorm1d({}, channel_dim=-1)  # in place of this one; then train again: it is another function"


class Axis(Rule):
    name = "axis"
    needs = "place"

    def of_layer(self, layer: Layer) -> Iterator[Finding]:
        place = layer.place
        if place is not None and place.wrong_axis:
            yield self.found(
                layer.name,
                "serious",
                f"{literal(place.before_said)} has its features in the last dimension, in another number than the "
                "{channels} channels that are normalized in dimension 1",
                REMEDY.format(place.width),
                confidence=0.9,
                channels=layer.channels,
            )

    def of_measured(self, layer: Layer, measured: Measured) -> Iterator[Finding]:
        if measured.features_from is not None:
            yield self.found(
                layer.name,
                "serious",
                f"the input of shape {list(measured.shape)} comes from {literal(measured.features_from)}, which has "
                "its features in the last dimension, but dimension 1, of {channels}, is normalized as channels",
                REMEDY.format(measured.shape[-1]),
                channels=layer.channels,
            )
