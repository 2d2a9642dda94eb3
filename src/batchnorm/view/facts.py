"""What can be said of a run in numbers and short lines, for the terminal, the page and --json alike."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..runs.schema import COLUMNS, QUANTITIES

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..runs.reader import Run
    from ..runs.schema import LayerInfo

PERCENTILES = {name: COLUMNS.index(name) for name in ("p05", "p50", "p95")}
NONFINITE = COLUMNS.index("nonfinite")

# What `meta` says under "learns" of an experiment in which nothing else does.
GAMMA_BETA = "gamma and beta"

# A channel is dead whose |gamma| is below this, beside a new layer's 1. So is one before a ReLU whose beta is below
# -BELOW |gamma|: of a normal distribution 0.13 % are above 3 standard deviations, and pass the ReLU.
NEAR_ZERO, BELOW = 1e-3, 3.0


def plural(count: int, noun: str, several: str | None = None) -> str:
    """Return "1 step", "2 steps"; or "2 batches", where the plural is not with an s."""
    return f"{count:,} {noun if count == 1 else several or noun + 's'}"


def some(names: Sequence[str], most: int = 4) -> str:
    """Return the first of the names, and how many more there are."""
    more = len(names) - most
    return ", ".join(names) if more < 2 else f"{', '.join(names[:most])} and {more} more"


def health(run: Run) -> str:
    """Return one line on what was checked, and no more than that: whether every recorded value was finite."""
    run = run.main
    if not run.layers:
        return "No batch-norm layer was recorded."
    layers = plural(len(run.layers), "BN layer")
    if not len(run.steps):
        return f"{layers}: no step was recorded."
    ill = {layer for layer, _ in nonfinite_steps(run)}
    if not ill:
        return f"{layers}: no NaN or infinity in {plural(len(run.steps), 'recorded step')}."
    return f"{layers}: {len(ill)} with NaN or infinite values, {len(run.layers) - len(ill)} without."


def extent(run: Run) -> str:
    """Return how much of a training was recorded, and at what cost, as far as the run says it."""
    run = run.main
    told, recorded = plural(len(run.steps), "recorded step"), run.recorded
    if isinstance(recorded.get("steps"), int) and recorded["steps"] > len(run.steps):
        told += f" of {recorded['steps']:,} taken"
    if isinstance(recorded.get("share_of_time"), float):
        told += f", which took {recorded['share_of_time']:.1%} of the time"
    return told


def progress(run: Run) -> str:
    """Return one line on how the training goes, or how it ended."""
    steps = run.main.steps
    reached = f"recorded up to step {steps[-1]:,}" if len(steps) else "no step is recorded yet"
    if run.status == "running":
        under_way = [name for name, arm in run.arms.items() if arm.status == "running"]
        where = f", arm {some(under_way)}" if under_way else ""
        return f"The training is running{where}: {reached}."
    if run.status == "interrupted":
        return f"The training was interrupted, and nothing writes to this run any more: {reached}."
    return f"The training {'has finished' if run.status == 'finished' else 'failed'}: {reached}."


def nonfinite_steps(run: Run) -> dict[tuple[str, str], NDArray[np.int64]]:
    """Return the recorded steps with NaN or infinity, for each (layer, quantity) that had any.

    The statistics say it for every step; alerts.jsonl has a line only where the count changed.
    """
    found = {}
    for layer in run.layers:
        for q in np.flatnonzero(run.broken(layer.name)):
            found[layer.name, QUANTITIES[q]] = run.steps[run.nonfinite(layer.name)[:, q] > 0]
    return found


def alert_lines(run: Run) -> list[str]:
    """Return a line for each layer and quantity that had values that were not finite: when first, how often."""
    return [
        f"{layer}: {quantity} not finite in {plural(len(steps), 'recorded step')}, first at step {steps[0]:,}"
        for (layer, quantity), steps in nonfinite_steps(run.main).items()
    ]


def damage_lines(run: Run) -> list[str]:
    """Return what of the run, and of each arm, was torn or garbage, a line each."""
    return [*run.damage, *(f"{name}: {line}" for name, arm in run.arms.items() for line in arm.damage)]


def arm_results(run: Run) -> dict[str, dict[str, Any]]:
    """Return what results.json says of each arm that is there, in the order in which the arms ran."""
    results = run.results.get("arms") or {}
    return {name: results[name] for name in run.arms if name in results}


def test_samples(run: Run) -> int:
    """Return on how many samples an experiment was tested; 0 where `meta`, which may hold anything, has no number."""
    said = run.meta.get("test_samples")
    return said if type(said) is int and 0 < said < 2**53 else 0


def brief(run: Run) -> dict[str, Any]:
    """Return what `batchnorm list` says of a run, ready for JSON."""
    accuracy = {name: result.get("test_accuracy") for name, result in arm_results(run).items()}
    return plain(
        {
            "path": str(run.path),
            "status": run.status,
            "created": run.created,
            "steps": len(run.main.steps),
            "layers": len(run.main.layers),
            "test_accuracy": {name: value for name, value in accuracy.items() if value is not None},
        }
    )


def facts(run: Run, most: int | None = None) -> dict[str, Any]:
    """Return what `batchnorm show` says of a run, ready for JSON: a number that is not finite becomes null.

    Args:
        run: a run from `open_run`.
        most: say it of so many layers; None for all.
    """
    main, results = run.main, arm_results(run)
    return plain(
        {
            "path": str(run.path),
            "status": run.status,
            "created": run.created,
            "meta": run.meta,
            "steps": len(main.steps),
            "recorded": main.recorded,
            "last_step": int(main.steps[-1]) if len(main.steps) else None,
            "health": health(run),
            "alerts": alert_lines(run),
            "damage": damage_lines(run),
            "arms": {name: _arm(results.get(name, {}), arm) for name, arm in run.arms.items()},
            "layers": [_layer(main, info) for info in main.layers[:most]],
        }
    )


def _arm(result: dict[str, Any], arm: Run) -> dict[str, Any]:
    kept = ("test_accuracy", "test_loss", "train_accuracy", "steps", "seconds")
    return {"status": arm.status} | {key: result[key] for key in kept if key in result}


def _layer(run: Run, info: LayerInfo) -> dict[str, Any]:
    said: dict[str, Any] = {
        "name": info.name,
        "kind": info.kind,
        "channels": info.channels,
        "affine": info.affine,
        "tracks": info.tracks,
    }
    for quantity in ("gamma", "beta", "batch_mean", "batch_var"):
        there = run.stats(info.name, quantity)
        # A row of NaN alone is a step at which the quantity did not exist; a count says that it was not finite.
        there = there[~np.isnan(there[:, NONFINITE])]
        if len(there):
            ends = {"first": there[0], "last": there[-1]}
            said[quantity] = {end: _percentiles(row) for end, row in ends.items()}
        else:
            said[quantity] = None
    return said


def _percentiles(row: NDArray[np.float32]) -> dict[str, float]:
    """Return the percentiles of a step; NaN where a channel was not finite, since those of the others mislead."""
    return {name: math.nan if row[NONFINITE] > 0 else float(row[at]) for name, at in PERCENTILES.items()}


def spoken(value: Any) -> str:
    """Return a value of `meta` as one would say it: lists with commas between."""
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def plain(value: Any) -> Any:
    """Return the value in JSON's own types; NaN and infinity, which JSON lacks, become None."""
    if isinstance(value, dict):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
