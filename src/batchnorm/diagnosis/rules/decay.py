"""Lint: weight decay on gamma and beta."""

from __future__ import annotations

from collections.abc import Iterator

from ..finding import Finding
from ..layer import Layer
from .rule import Rule


class Decay(Rule):
    name = "decay"
    needs = "optimizer"

    def of_layer(self, layer: Layer) -> Iterator[Finding]:
        if layer.place is not None and layer.place.decay > 0:
            yield self.found(
                layer.name,
                "note",
                "the optimizer decays gamma and beta by {decay:g}: the output shrinks, while decay of earlier weights "
                "would not change it",
                layer.place.undecayed,
                decay=layer.place.decay,
            )
