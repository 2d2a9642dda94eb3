"""A run as rows of long tables, by columns, a layer and quantity at a time: for export and for frames."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from .schema import COLUMNS, HISTOGRAM_EDGES, LEARNED, PROBED, QUANTITIES
from .update import OPTION_NAMES, STATE_NAMES, Change

if TYPE_CHECKING:
    from .reader import Run


def stats_rows(run: Run) -> Iterator[dict[str, Any]]:
    """Yield a row a step where the quantity existed, for each layer and quantity: its statistics."""
    for layer in run.layers:
        for quantity in QUANTITIES:
            values = run.stats(layer.name, quantity)
            exists = ~np.isnan(values[:, -1])
            if exists.any():
                yield {
                    **_key(run.steps[exists], layer.name, quantity),
                    **{name: values[exists, k] for k, name in enumerate(COLUMNS)},
                    "count": run.counts(layer.name)[exists],
                    "forwards": run.forwards(layer.name)[exists],
                }


def vectors_rows(run: Run) -> Iterator[dict[str, Any]]:
    """Yield a row a step and channel, for each layer and quantity: the whole vectors."""
    for layer in run.layers:
        for quantity in QUANTITIES:
            steps, values = run.vectors(layer.name, quantity)
            exists = np.isin(steps, run.steps[~np.isnan(run.stats(layer.name, quantity)[:, -1])])
            if exists.any():
                steps, values = steps[exists], values[exists]
                yield {
                    **_key(np.repeat(steps, layer.channels), layer.name, quantity),
                    "channel": np.tile(np.arange(layer.channels), len(steps)),
                    "value": values.ravel(),
                }


def probes_rows(run: Run) -> Iterator[dict[str, Any]]:
    """Yield a row a probed step, batch and channel, for each layer and measured quantity."""
    for layer in run.layers:
        for quantity in PROBED:
            steps, values = run.probes(layer.name, quantity)
            if values.size:
                probe, batch, channel = np.indices(values.shape).reshape(3, -1)
                yield {
                    **_key(steps[probe], layer.name, quantity),
                    "probe": probe,
                    "batch": batch,
                    "channel": channel,
                    "value": values.ravel(),
                }


def histograms_rows(run: Run) -> Iterator[dict[str, Any]]:
    """Yield a row a probed step, batch, channel and bin, for each layer."""
    for layer in run.layers:
        steps, channels, shares = run.histograms(layer.name)
        if shares.size:
            probe, batch, channel, place = np.indices(shares.shape).reshape(4, -1)
            yield {
                "step": steps[probe],
                "layer": [layer.name] * len(probe),
                "probe": probe,
                "batch": batch,
                "channel": channels[channel],
                "low": HISTOGRAM_EDGES[place],
                "share": shares.ravel(),
            }


def updates_rows(run: Run) -> Iterator[dict[str, Any]]:
    """Yield a row a worked step and channel, for each layer and learned quantity."""
    for layer in run.layers:
        for update in run.updates(layer.name):
            for quantity in LEARNED:
                change: Change | None = getattr(update, quantity)
                if change is not None:
                    n = len(update.channels)
                    none = np.full(n, np.nan, np.float32)
                    yield {
                        **_key(np.full(n, update.step), layer.name, quantity),
                        "channel": update.channels,
                        "before": change.before,
                        "gradient": change.gradient,
                        "after": change.after,
                        **{name: change.state.get(name, none) for name in STATE_NAMES},
                        "optimizer": [change.optimizer] * n,
                        "steps": np.full(n, float(change.steps)),
                        **{name: np.full(n, float(change.options.get(name, np.nan))) for name in OPTION_NAMES},
                    }


def _key(steps: np.ndarray, layer: str, quantity: str) -> dict[str, Any]:
    return {"step": steps, "layer": [layer] * len(steps), "quantity": [quantity] * len(steps)}
