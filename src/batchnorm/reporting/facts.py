"""What can be said of a run in numbers and short lines, for the terminal, the page and --json alike."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from ..record.schema import COLUMNS

if TYPE_CHECKING:
    from ..record.run import Run
    from ..record.schema import LayerInfo

PERCENTILES = {name: COLUMNS.index(name) for name in ("p05", "p50", "p95")}


def plural(count: int, noun: str) -> str:
    """Return "1 step", "2 steps"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def health(run: Run) -> str:
    """Return one line on what was checked, and no more than that: whether every recorded value was finite."""
    run = run.main
    if not run.layers:
        return "No batch-norm layer was recorded."
    layers = plural(len(run.layers), "BN layer")
    ill = {str(alert["layer"]) for alert in run.alerts() if alert.get("what") == "nonfinite"}
    if not ill:
        return f"{layers}: no NaN or infinity in {plural(len(run.steps), 'recorded step')}."
    return f"{layers}: {len(ill)} with NaN or infinite values, {len(run.layers) - len(ill)} without."


def alert_lines(run: Run) -> list[str]:
    """Return a line for each layer and quantity that had values that were not finite: when first, how often."""
    found: dict[tuple[str, str], list[int]] = {}
    for alert in run.main.alerts():
        found.setdefault((str(alert.get("layer")), str(alert.get("quantity"))), []).append(int(alert["step"]))
    return [
        f"{layer}: {quantity} not finite in {plural(len(steps), 'step')}, first at step {min(steps):,}"
        for (layer, quantity), steps in found.items()
    ]


def damage_lines(run: Run) -> list[str]:
    """Return what of the run, and of each arm, was torn or garbage, a line each."""
    return [*run.damage, *(f"{name}: {line}" for name, arm in run.arms.items() for line in arm.damage)]


def arm_results(run: Run) -> dict[str, dict[str, Any]]:
    """Return what results.json says of each arm that is there, in the order in which the arms ran."""
    results = run.results.get("arms") or {}
    return {name: results[name] for name in run.arms if isinstance(results.get(name), dict)}


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


def facts(run: Run) -> dict[str, Any]:
    """Return what `batchnorm show` says of a run, ready for JSON: a number that is not finite becomes null."""
    main, results = run.main, arm_results(run)
    return plain(
        {
            "path": str(run.path),
            "status": run.status,
            "created": run.created,
            "meta": run.meta,
            "steps": len(main.steps),
            "last_step": int(main.steps[-1]) if len(main.steps) else None,
            "health": health(run),
            "alerts": alert_lines(run),
            "damage": damage_lines(run),
            "arms": {name: _arm(results.get(name, {}), arm) for name, arm in run.arms.items()},
            "layers": [_layer(main, info) for info in main.layers],
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
        there = there[np.isfinite(there[:, 3])]
        if len(there):
            ends = {"first": there[0], "last": there[-1]}
            said[quantity] = {end: {p: row[at] for p, at in PERCENTILES.items()} for end, row in ends.items()}
        else:
            said[quantity] = None
    return said


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
