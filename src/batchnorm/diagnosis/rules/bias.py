"""Lint: a bias before batch normalization, which the mean that is subtracted cancels."""

from __future__ import annotations

from collections.abc import Iterator

from ..finding import Finding
from ..layer import Layer
from .rule import Rule, literal

LEAVE = "# keep it in a trained model, whose running mean includes it; build the next one with bias=False"


class Bias(Rule):
    name = "bias"
    needs = "place"

    def of_layer(self, layer: Layer) -> Iterator[Finding]:
        place = layer.place
        if place is None or place.before is None or not place.has_bias or place.frozen:
            return
        yield self.found(
            layer.name,
            "note",
            f"{literal(place.before_said)} adds a bias to {{channels}} channels, and the subtraction of the mean "
            "cancels it: beta acts as the bias",
            "{layer}.bias = None  # before training" if layer.is_new else LEAVE,
            target=place.before,
            confidence=1.0 if place.surely else 0.7,
            channels=layer.channels,
        )
