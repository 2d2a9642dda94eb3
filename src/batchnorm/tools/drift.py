"""Drift: how far running statistics were from what was measured, layer by layer, in a table."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..table import Table
from .population import Saved


@dataclass(frozen=True)
class Drift:
    """How far one layer's running statistics were from what it measured; or why the layer was left alone.

    Attributes:
        layer: its name in the model.
        state: "recalibrated"; or why it was left alone: "frozen", "in eval mode", "does not track", "did not run",
            "nothing non-finite".
        channels: C.
        written: in how many channels the running statistics have been set.
        values: values per channel that were measured; with masks, the smallest number.
        nonfinite: in how many channels the tracked mean or variance was NaN, infinite or negative.
        mean: (C,) float64, (tracked - measured) / sigma, where sigma = sqrt(measured variance + eps): the shift of the
            layer's output before gamma. None if nothing was measured; NaN where the tracked value was NaN.
        log_variance: (C,) float64, ln((tracked + eps) / (measured + eps)), of the variances: 0 where they agree.
    """

    layer: str
    state: str
    channels: int
    written: int = 0
    values: int = 0
    nonfinite: int = 0
    mean: Tensor | None = None
    log_variance: Tensor | None = None

    def to_dict(self) -> dict[str, Any]:
        """What JSON can write: median and largest absolute value over the finite channels; None if there are none."""
        said: dict[str, Any] = {
            name: getattr(self, name) for name in ("layer", "state", "channels", "written", "values", "nonfinite")
        }
        for name, off in (("mean_drift", self.mean), ("log_variance_ratio", self.log_variance)):
            sizes = torch.zeros(0) if off is None else off[off.isfinite()].abs()
            said[name] = {"median": sizes.median().item(), "max": sizes.max().item()} if sizes.numel() else None
        return said


@dataclass(frozen=True)
class Recalibration(Table):
    """What `recalibrate` found and did, one `Drift` per layer; shown as a table, printed or in a notebook.

    Attributes:
        layers: every batch-norm layer of the model, in its order.
        passes: number of passes over the batches.
    """

    _numbers = ("channels", "values", "mean off by (σ)", "largest", "ln variance ratio")
    _columns = ("layer", "channels", "values", "mean off by (σ)", "largest", "ln variance ratio", "largest", "")

    layers: list[Drift]
    passes: int
    _saved: Saved

    def undo(self) -> None:
        """Restore what the layers had before, bit for bit, whatever has happened since."""
        self._saved.restore()

    def to_dict(self) -> dict[str, Any]:
        """What json can write."""
        return {"passes": self.passes, "layers": [drift.to_dict() for drift in self.layers]}

    @property
    def headline(self) -> str:
        """Empty: the table needs no headline."""
        return ""

    def _cells(self) -> Iterable[tuple[str, ...]]:
        for drift in self.layers:
            said = drift.to_dict()
            numbers = [
                "" if said[name] is None else f"{said[name][of]:.3g}"
                for name in ("mean_drift", "log_variance_ratio")
                for of in ("median", "max")
            ]
            state = drift.state
            if 0 < drift.written < drift.channels:
                state += f", {drift.written} of {drift.channels} channels"
            if drift.nonfinite:
                state += f"; {drift.nonfinite} had been non-finite"
            yield drift.layer or "(the layer)", str(drift.channels), f"{drift.values:,}", *numbers, state


def distance(mean: Tensor, variance: Tensor, to_mean: Tensor, to_variance: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Distance of one mean and variance from others, as `Drift` has it."""
    log_variance = ((variance + eps) / (to_variance + eps)).log()
    return (mean - to_mean) / (to_variance + eps).sqrt(), log_variance
