"""The page's data for its scripts: columns of float32 in base64, rows of small tables, and where to look first."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .facts import arm_results, plain, test_samples
from .paper import paper_rows
from .select import BANDS, Selection, nearest, pack

if TYPE_CHECKING:
    from ..runs.reader import Run


def first_look(selection: Selection) -> tuple[int, int]:
    """Return the step to open the page at and the probed step nearest to it; 0 if none.

    Three quarters of the way; where batches were probed, at the probe nearest to that, so that both panels and the
    strips beside them show the same weights. Where a value was not finite, at the first step that had one.
    """
    if not len(selection.steps):
        return 0, 0
    probed, bad = selection.probe_steps, selection.bad_step
    step = int(selection.steps[(len(selection.steps) - 1) * 3 // 4]) if bad is None else bad
    if not len(probed):
        return step, step
    probe = int(probed[nearest(probed, step)])
    return (int(selection.steps[nearest(selection.steps, probe)]) if bad is None else bad), probe


def payload(run: Run, selection: Selection) -> dict[str, Any]:
    """Return the page's data: columns of float32 in base64, which keep NaN and take half the room of decimals."""
    from . import charts

    step, probe = first_look(selection)
    layers = [
        {
            "name": view.info.name,
            "kind": view.info.kind,
            "size": view.info.channels,
            "eps": view.info.eps,
            "momentum": view.info.momentum,
            "affine": view.info.affine,
            "tracks": view.info.tracks,
            "channels": view.channels.tolist(),
            "moved": bool(view.moved[0] > 0),
            "counts": view.counts.tolist(),
            "broken": {quantity: at for quantity, at in view.broken.items() if at},
            "columns": {quantity: pack(values) for quantity, values in view.columns.items()},
            "probes": {quantity: pack(values) for quantity, values in view.probes.items()},
            "batches": view.probes["batch_mean"].shape[1],
            "bands": {quantity: pack(values) for quantity, values in view.bands.items()},
        }
        for view in selection.layers
    ]
    return {
        "steps": selection.steps.tolist(),
        "probe_steps": selection.probe_steps.tolist(),
        "band_steps": selection.band_steps.tolist(),
        "bands": BANDS,
        "first": {"layer": selection.first[0], "place": selection.first[1], "step": step, "probe": probe},
        "layers": layers,
        "arms": arms_rows(run),
        "paper": paper_rows(run),
        "config": {"light": charts.config(charts.LIGHT), "dark": charts.config(charts.DARK)},
    }


def arms_rows(run: Run) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of the charts that compare arms: curves, final, pairs."""
    curves: list[dict[str, Any]] = []
    final: list[dict[str, Any]] = []
    pairs: list[dict[str, Any]] = []
    for order, (arm, result) in enumerate(arm_results(run).items()):
        about = {"arm": arm, "order": order}
        final.append(about | _with_chance(result.get("test_accuracy"), test_samples(run)))
        curve = result.get("curve") or {}
        points = zip(curve.get("step", []), curve.get("test_accuracy", []), strict=False)
        curves += [about | {"step": step, "test_accuracy": accuracy} for step, accuracy in points]
        singles = (result.get("single_pair_accuracy") or {}).get("all", [])
        pairs += [about | {"test_accuracy": accuracy} for accuracy in singles]
    return plain({"curves": curves, "final": final, "pairs": pairs})


def _with_chance(accuracy: float | None, samples: int) -> dict[str, float | None]:
    """Return an accuracy and how far, up or down, chance may have moved it: two standard errors on so many samples."""
    lo = hi = None
    if accuracy is not None and samples:
        from .numbers import STANDARD_ERRORS

        away = STANDARD_ERRORS * (accuracy * (1 - accuracy) / samples) ** 0.5
        lo, hi = max(0.0, accuracy - away), min(1.0, accuracy + away)
    return {"test_accuracy": accuracy, "lo": lo, "hi": hi}
