"""Fault 3: gamma and beta are frozen, and the running statistics still change."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from ..finding import Finding
from ..history import History
from ..layer import Layer
from .rule import Rule

LEAST = 5  # recorded vectors
# With a gradient this large the smallest usual learning rate, 1e-4, moves a gamma of 1 beyond float32's rounding, 6e-8.
LARGE = 1e-3
REMEDY = "bn.freeze({layer}, stats=True, affine=True)  # from here on train mode normalizes as eval mode does"


class FreezeLeak(Rule):
    name = "freeze-leak"
    needs = "place"

    def of_layer(self, layer: Layer) -> Iterator[Finding]:
        place, settings = layer.place, layer.settings
        if place is None or settings is None or place.learns or place.frozen:
            return
        # Gamma and beta that never learn are a design: their statistics have to be tracked, as a new layer's have.
        if not layer.has_learned or layer.is_fresh:
            return
        if not settings.tracks or settings.momentum == 0 or layer.gamma is None:
            return
        when = "change with every batch" if place.training else "will change after the next model.train()"
        yield self.found(
            layer.name,
            "serious" if place.training else "warning",
            f"gamma and beta require no gradient, but the running statistics of {{channels}} channels {when}",
            REMEDY,
            confidence=0.9,
            channels=layer.channels,
        )

    def of_run(self, history: History) -> Iterator[Finding]:
        name, layer = history.info.name, history.layer
        if layer.is_plain or history.forwards.max(initial=0) == 0:
            return
        learned = [history.vectors(quantity)[1] for quantity in ("gamma", "beta")]
        running = history.vectors("running_mean")[1]
        if len(running) < LEAST:
            return
        if any(np.isfinite(values).all() and np.ptp(values, axis=0).any() for values in learned):
            return
        changed = int((running[-1] != running[0]).sum())
        gradient = history.largest("gamma_grad", "beta_grad")
        if not changed or (gradient is not None and gradient < LARGE):  # gamma that could not move is not frozen
            return
        facts: dict[str, Any] = {} if gradient is None else {"gradient": gradient}
        why = "had no gradient" if gradient is None else "did not move at a gradient of up to {gradient:.2g}"
        yield self.found(
            name,
            "serious" if gradient is None else "warning",
            f"gamma and beta {why}, but the running mean changed in {{changed}} of {{channels}} channels",
            REMEDY,
            since_step=int(history.steps[0]),
            confidence=0.9 if gradient is None else 0.6,
            changed=changed,
            channels=layer.channels,
            **facts,
        )
