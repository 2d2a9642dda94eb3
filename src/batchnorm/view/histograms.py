"""How the values of a channel are spread in several batches at the same weights: what the page draws of it."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..runs.histogram import MOST, stored
from ..runs.schema import HISTOGRAM_BINS, HISTOGRAM_EDGES
from .select import thin

if TYPE_CHECKING:
    from .select import Selection

# Bytes on the page, all layers together; batches of a probe, so that their lines can be told apart.
HISTOGRAM_BYTES, MAX_BATCHES = 60_000, 5


@dataclass(frozen=True)
class Histograms:
    """Histograms of normalized values, (x - mean) / sqrt(var + eps), of the shown channels.

    Attributes:
        steps: the P probed steps that have them.
        layers: for each shown layer (P, B, c, bins) uint8, as `runs.histogram` stores shares; None where nothing was
            recorded.
    """

    steps: list[int]
    layers: list[np.ndarray | None]

    def __bool__(self) -> bool:
        return any(layer is not None for layer in self.layers)

    def payload(self) -> dict[str, Any]:
        """Return the data of the page's script."""
        layers = [
            None if each is None else {"batches": each.shape[1], "shares": base64.b64encode(each.tobytes()).decode()}
            for each in self.layers
        ]
        return {"steps": self.steps, "layers": layers, "edges": HISTOGRAM_EDGES.tolist(), "largest": MOST}


def histograms(selection: Selection) -> Histograms:
    """Return the histograms of the channels and probes that a page shows, as many as fit it."""
    run, places = selection.run, sum(len(view.channels) for view in selection.layers)
    recorded = [run.histograms(view.info.name) for view in selection.layers]
    there = np.intersect1d(selection.probe_steps, recorded[0][0]) if recorded else np.empty(0, np.int64)
    if not len(there):
        return Histograms([], [None for _ in selection.layers])
    most = max(1, HISTOGRAM_BYTES // (HISTOGRAM_BINS * MAX_BATCHES * places))
    steps = there[thin(len(there), most)]
    layers = []
    for view, (probed, channels, shares) in zip(selection.layers, recorded, strict=True):
        # A step may have been probed twice: the last one counts.
        rows = np.searchsorted(probed, steps, side="right") - 1
        kept = np.full((len(steps), min(shares.shape[1], MAX_BATCHES), len(view.channels), HISTOGRAM_BINS), np.nan)
        place = np.minimum(np.searchsorted(channels, view.channels), max(len(channels) - 1, 0))
        has = channels[place] == view.channels if len(channels) else np.zeros(len(view.channels), bool)
        kept[:, :, has] = shares[rows][:, :MAX_BATCHES, place[has]]
        layers.append(stored(kept) if has.any() else None)
    return Histograms(steps.tolist(), layers)
