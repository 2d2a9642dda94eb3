"""Lint: layers in another mode than the model, and evaluation in train mode."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..finding import Finding
from ..history import History
from ..layer import Layer
from .rule import Rule

LEAST = 2  # evaluations: a single forward may be a try
MOST = 0.5  # of the steps: so much of a training is not in eval mode on purpose
RARE = 1 / 3  # of the steps; what happens more often belongs to the training


class Mode(Rule):
    name = "mode"
    needs = "settings"

    def of_layer(self, layer: Layer) -> Iterator[Finding]:
        place, settings = layer.place, layer.settings
        if settings is not None and not settings.tracks:
            yield self.found(
                layer.name,
                "note",
                "the layer has no running statistics: in eval too, the output for a sample depends on the {channels} "
                "channels of the other samples in its batch",
                "# leave a trained model as it is; build the next one with track_running_stats=True",
                channels=layer.channels,
            )
        elif place is None:
            return
        elif place.training and not place.model_training:
            yield self.found(
                layer.name,
                "serious",
                "the layer is in train mode within a model in eval mode: it normalizes with each batch, and every "
                "batch that is evaluated moves the running statistics of its {channels} channels",
                "model.eval()",
                channels=layer.channels,
            )
        elif not place.training and place.model_training and not place.frozen:
            yield self.found(
                layer.name,
                "note",
                "the layer is in eval mode within a model in train mode, until the next model.train(): {channels} "
                "channels then track batches again",
                "bn.freeze({layer})",
                channels=layer.channels,
            )

    def of_run(self, history: History) -> Iterator[Finding]:
        if history.asleep is not None:
            step, steps = history.asleep
            yield self.found(
                history.info.name,
                # Statistics are frozen on purpose too, for the last steps: that nobody can tell apart.
                "warning" if steps > MOST * len(history.steps) else "note",
                "after training the layer did not run in train mode in {steps} of {recorded} recorded steps, while its "
                "gamma and beta had gradients: unless they were frozen on purpose, model.train() is missing after an "
                "evaluation. In eval mode nothing is measured or tracked, and dropout is off",
                "model.train()  # before training goes on after an evaluation; to mean it: bn.freeze(model)",
                since_step=step,
                confidence=0.8,
                steps=steps,
                recorded=len(history.steps),
            )
        # Forwards in train mode after one optimizer step and before the next: an evaluation adds its batches to them.
        forwards, steps = history.forwards[1:], history.steps[1:]
        if not (forwards > 0).any():
            return
        usual = float(np.median(forwards[forwards > 0]))
        more = forwards > usual
        if more.sum() >= LEAST and more.mean() <= RARE:
            yield self.found(
                history.info.name,
                "serious",
                "the layer ran {usual:g} times in train mode in most steps, but up to {most} times in {times} of "
                "{recorded}: as if the model were evaluated in train mode, which moves the running statistics to the "
                "test data",
                "model.eval()  # before evaluating, and model.train() after it",
                since_step=int(steps[more][0]),
                confidence=0.8,
                usual=usual,
                most=int(forwards.max()),
                times=int(more.sum()),
                recorded=len(forwards),
            )
