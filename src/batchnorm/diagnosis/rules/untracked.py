"""Fault 9: running statistics of a new layer beside weights that were trained."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..finding import Finding
from ..layer import Layer
from .rule import RECALIBRATE, Rule


class Untracked(Rule):
    name = "untracked"

    def of_layer(self, layer: Layer) -> Iterator[Finding]:
        if layer.settings is None and layer.running_var is None:
            yield self.found(
                layer.name,
                "serious",
                "the checkpoint has gamma and beta of {channels} channels, but no running statistics, as if it was "
                "saved without buffers: in a model that loads it they are 0 and 1",
                "torch.save(model.state_dict(), path)  # not the parameters alone; where they are lost, "
                + RECALIBRATE.partition("  #")[0],
                confidence=0.8,
                channels=layer.channels,
            )
            return
        if not layer.is_fresh or layer.is_new or (layer.settings and not layer.settings.tracks):
            return
        if layer.has_learned:
            shown, confidence = "beta differs between the channels, as only training makes it", 0.9
        elif layer.settings is None or layer.settings.momentum != 0:  # that one is another rule's
            shown, confidence = "num_batches_tracked is {updates}", 0.95
        else:
            return
        facts: dict[str, Any] = {} if layer.updates is None else {"updates": layer.updates}
        yield self.found(
            layer.name,
            "serious",
            f"the running statistics of {{channels}} channels are 0 and 1 as in a new layer, but {shown}: in eval "
            "nothing is normalized",
            RECALIBRATE,
            confidence=confidence,
            channels=layer.channels,
            **facts,
        )
