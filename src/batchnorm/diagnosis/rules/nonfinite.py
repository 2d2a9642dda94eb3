"""Fault 2: statistics or parameters that are NaN or infinite, or a negative variance."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..finding import Finding
from ..history import History
from ..layer import Layer
from .rule import Rule

TRACKED = ("running_mean", "running_var")
REPAIR = 'bn.recalibrate(model, batches, only="nonfinite")  # sets the broken channels alone'
RESTORE = "model.load_state_dict(torch.load(LAST_GOOD_CHECKPOINT, weights_only=True))  # weights of before the fault"


class Nonfinite(Rule):
    name = "nonfinite"

    def of_layer(self, layer: Layer) -> Iterator[Finding]:
        bad = {}
        for quantity in ("gamma", "beta", *TRACKED):
            vector = getattr(layer, quantity)
            if vector is not None and not np.isfinite(vector).all():
                bad[quantity] = int((~np.isfinite(vector)).sum())
        if layer.running_var is not None and (layer.running_var < 0).any():
            bad["negative running_var"] = int((layer.running_var < 0).sum())
        if bad:
            learned = "gamma" in bad or "beta" in bad
            listed = ", ".join(f"{name} in {count}" for name, count in bad.items())
            yield self.found(
                layer.name,
                "serious",
                f"not finite, or negative: {listed} of {{channels}} channels",
                RESTORE if learned else REPAIR,
                channels=layer.channels,
                **{name.replace(" ", "_"): count for name, count in bad.items()},
            )

    def of_run(self, history: History) -> Iterator[Finding]:
        first = {
            quantity: history.first_nonfinite(quantity)
            for quantity in ("batch_mean", "batch_var", "gamma", "beta", *TRACKED)
        }
        began = {quantity: found for quantity, found in first.items() if found is not None}
        if not began:
            return
        quantity = min(began, key=lambda name: began[name][0])
        step, steps = began[quantity]
        last = history.run.stats(history.info.name, quantity)[-1, -1]
        yield self.found(
            history.info.name,
            "serious",
            f"{quantity} was not finite in {{steps}} of {{recorded}} recorded steps, first at step {{first}}"
            + (", and still is" if last > 0 else ", and is finite again"),
            RESTORE if "gamma" in began or "beta" in began else REPAIR,
            since_step=step,
            steps=steps,
            recorded=len(history.steps),
            first=step,
        )
