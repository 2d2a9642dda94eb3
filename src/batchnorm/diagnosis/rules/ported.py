"""Fault 6: a momentum of another framework's meaning, or one that never tracks."""

from __future__ import annotations

from collections.abc import Iterator

from ..finding import Finding
from ..layer import Layer
from .rule import Rule

# Frameworks that mean the share of the old have 0.9 (Caffe, Flax 0.99, Keras 0.99, TensorFlow's examples 0.997, 0.999).
MOST = 0.5


class Ported(Rule):
    name = "momentum"
    needs = "settings"

    def of_layer(self, layer: Layer) -> Iterator[Finding]:
        settings = layer.settings
        if settings is None or not settings.tracks or settings.momentum is None:
            return
        if layer.place is not None and layer.place.frozen:
            return
        momentum = settings.momentum
        if momentum == 0:
            yield self.found(
                layer.name,
                "serious" if layer.is_fresh else "warning",
                "momentum is {momentum:g}: the running statistics never change",
                "{layer}.momentum = 0.1",
                confidence=0.9,
                momentum=momentum,
            )
        elif MOST <= momentum < 1:
            yield self.found(
                layer.name,
                "serious",
                "momentum is {momentum:g}, which in PyTorch is the share of the new batch: the running statistics are "
                "those of the last {batches:.2g} batches. In Keras and Flax, momentum is the share of the old value",
                f"{{layer}}.momentum = {round(1 - momentum, 6)}",
                confidence=0.9,
                momentum=momentum,
                batches=(2 - momentum) / momentum,
            )
