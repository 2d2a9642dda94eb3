"""Fault 4: the running statistics are updated more than once, or not at all, in a step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from ..finding import Finding
from ..history import History
from ..layer import Layer
from ..measured import Measured
from .rule import Rule

FAR = 0.25  # from one update a step
LEAST_PAIRS = 5
CONVERT = "bn.convert(model)  # activation checkpointing: our layers tell a recomputation"
REMEDY = f"""with bn.accumulate(model):  # the micro-batches of one step
    for batch in micro_batches:
        model(batch)
with bn.no_update(model):  # a forward that is no step of its own
    model(batch)
{CONVERT}"""


class Updates(Rule):
    name = "updates"

    def of_run(self, history: History) -> Iterator[Finding]:
        info, forwards = history.info, history.forwards[history.forwards > 0]
        if not len(forwards) or not info.tracks or info.momentum is None or not 0 < info.momentum < 1:
            return
        usual, pairs = float(np.median(forwards)), history.pairs
        facts: dict[str, Any] = {"forwards": usual, "momentum": info.momentum}
        if len(pairs.moved) >= LEAST_PAIRS:
            share = float((pairs.moved * pairs.distance).sum() / max((pairs.distance**2).sum(), 1e-30))
            # One update moves by the share m of the distance, k of them by 1 - (1 - m)^k.
            updates = float(np.log1p(-min(share, 1 - 1e-9)) / np.log1p(-info.momentum))
            if abs(updates - 1) <= FAR:
                return
            said = (
                "a step moves the running mean {share:.3g} of the way to what was measured, as {updates:.2g} updates "
            )
            said += "with momentum {momentum:g} do; the layer ran {forwards:g} times a step"
            facts |= {"share": share, "updates": updates}
            confidence = 0.9
        elif usual > 1:  # without whole vectors
            said, confidence = "the layer ran {forwards:g} times in train mode in a step", 0.5
        else:
            return
        yield self.found(
            info.name, "warning", said, REMEDY, since_step=int(history.steps[0]), confidence=confidence, **facts
        )

    def of_measured(self, layer: Layer, measured: Measured) -> Iterator[Finding]:
        if measured.updates > 1:
            shared = f", and a forward runs it {measured.calls} times" if measured.calls > 1 else ""
            yield self.found(
                layer.name,
                "warning",
                f"one step updates the running statistics {{updates}} times{shared}",
                REMEDY if measured.calls > 1 else CONVERT,
                updates=measured.updates,
                calls=measured.calls,
            )
