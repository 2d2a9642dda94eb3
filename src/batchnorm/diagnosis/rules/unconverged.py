"""Fault 1: running statistics that are not those of the data, because they began elsewhere or lag behind."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..finding import Finding, Severity
from ..history import History
from ..layer import Layer, drift
from ..measured import Measured
from .preprocessing import CHECK_FIRST
from .rule import RECALIBRATE, Rule

LEFTOVER = 0.01  # of the initial 0 and 1 in the running statistics
# Drift of a layer: of the mean in standard deviations, of the variance as |log ratio|, root mean square over channels.
MEAN_WARNING, MEAN_SERIOUS = 0.25, 0.5
VAR_WARNING, VAR_SERIOUS = 0.35, 0.7


class Unconverged(Rule):
    name = "unconverged"
    measured_is_better = True

    def of_layer(self, layer: Layer) -> Iterator[Finding]:
        mean, var, updates = layer.running_mean, layer.running_var, layer.updates
        if mean is None or var is None or not updates or layer.is_fresh:
            return
        momentum = layer.momentum
        if momentum is None or not 0 < momentum < 1:
            return
        leftover = (1 - momentum) ** updates
        if leftover <= LEFTOVER or not (np.isfinite(mean).all() and np.isfinite(var).all()):
            return
        # If they began as 0 and 1, this is what would be there without that beginning.
        eps = layer.eps
        true_mean, true_var = mean / (1 - leftover), (var - leftover) / (1 - leftover)
        if (true_var < -1e-6).any():
            return  # then they did not
        mean_drift, log_ratio = drift(mean, var, true_mean, true_var, eps)
        severity = _severity(mean_drift, log_ratio) or "note"
        # Only a run shows that they did: recalibrated ones have tracked few batches too.
        shown = layer.step is not None
        if severity == "serious" and not shown:
            severity = "warning"
        yield self.found(
            layer.name,
            severity,
            ("" if shown else "unless they were recalibrated, ")
            + "{leftover:.1%} of the running statistics are still the initial 0 and 1, after {updates} batches with "
            "momentum {momentum:g}: the mean is off by {mean_drift:.2g} standard deviations, the variance by a factor "
            "of {var_factor:.3g}",
            RECALIBRATE,
            since_step=0 if shown else None,
            confidence=0.9 if shown else 0.6 if layer.settings else 0.5,
            assumed=layer.assumes("momentum"),
            leftover=leftover,
            updates=updates,
            momentum=momentum,
            mean_drift=mean_drift,
            var_factor=float(np.exp(log_ratio)),
        )

    def of_run(self, history: History) -> Iterator[Finding]:
        if history.asleep is not None:
            return  # what it is given has moved on since, and it normalizes without it
        layer = history.layer
        if layer.running_mean is None or layer.running_var is None or history.recent is None:
            return
        means, variances, steps = history.recent
        measured_mean, measured_var = means.mean(0), variances.mean(0) + means.var(0)
        yield from self._drifted(
            layer.name,
            *drift(layer.running_mean, layer.running_var, measured_mean, measured_var, history.info.eps),
            f"what the last {len(means)} recorded batches (from step {steps[0]:,}) measured",
            0.8,
        )

    def of_measured(self, layer: Layer, measured: Measured) -> Iterator[Finding]:
        if layer.running_mean is None or layer.running_var is None or layer.settings is None or not measured.batches:
            return
        if measured.inputs.scale is not None:
            return  # that other data measure something else says nothing of the statistics
        yield from self._drifted(
            layer.name,
            *drift(layer.running_mean, layer.running_var, measured.mean, measured.var, layer.settings.eps),
            f"what {measured.batches} batches measure",
            0.95,
            new=layer.is_new,
            remedy=CHECK_FIRST if measured.inputs.moved else RECALIBRATE,
        )

    def _drifted(
        self,
        layer: str,
        mean_drift: float,
        log_ratio: float,
        against: str,
        confidence: float,
        new: bool = False,
        remedy: str = RECALIBRATE,
    ) -> Iterator[Finding]:
        severity = _severity(mean_drift, log_ratio)
        if severity:
            yield self.found(
                layer,
                "note" if new else severity,
                ("nothing has been tracked yet: " if new else "")
                + f"the running statistics are not {against}: the mean is off by {{mean_drift:.2g}} standard "
                "deviations, the variance by a factor of {var_factor:.3g} (root mean square over the channels)",
                remedy,
                confidence=confidence,
                mean_drift=mean_drift,
                var_factor=float(np.exp(log_ratio)),
            )


def _severity(mean_drift: float, log_ratio: float) -> Severity | None:
    if mean_drift > MEAN_SERIOUS or log_ratio > VAR_SERIOUS:
        return "serious"
    if mean_drift > MEAN_WARNING or log_ratio > VAR_WARNING:
        return "warning"
    return None  # a NaN too: that is another rule's
