"""Runs made up number by number and written through the record's own writer: no torch, any size, any fault."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from batchnorm.runs import histogram
from batchnorm.runs.journal import Journal
from batchnorm.runs.lines import Lines
from batchnorm.runs.schema import (
    HISTOGRAM_EDGES,
    HISTOGRAMS,
    OPTIMIZERS,
    PROBES,
    QUANTITIES,
    STATS,
    UPDATES,
    VECTORS,
    LayerInfo,
    stats_dtype,
)
from batchnorm.runs.update import Row, encode, kept_channels

Values = Mapping[str, np.ndarray]  # quantity -> (T, C)


def layer(name: str = "bn", channels: int = 4, **changes: Any) -> LayerInfo:
    facts = {"kind": "BatchNorm1d", "eps": 1e-5, "momentum": 0.1, "affine": True, "tracks": True}
    return LayerInfo(name=name, channels=channels, **{**facts, **changes})


def story(info: LayerInfo, steps: int, seed: int = 0) -> dict[str, np.ndarray]:
    """What a layer could have recorded: jagged measured values, smooth learned ones, running averages."""
    draw = np.random.default_rng(seed)
    shape, along = (steps, info.channels), np.linspace(0, 1, steps)[:, None]
    none = np.full(shape, np.nan)
    rate = draw.uniform(0.2, 1, info.channels)
    values = {
        "batch_mean": 0.5 + along + draw.normal(0, 0.2, shape),
        "batch_var": draw.uniform(0.5, 1.5, shape),
        "gamma": 1 + rate * along if info.affine else none,
        "beta": -0.5 * rate * along if info.affine else none,
        "gamma_grad": draw.normal(0, 0.01, shape) if info.affine else none,
        "beta_grad": draw.normal(0, 0.01, shape) if info.affine else none,
        "running_mean": none,
        "running_var": none,
    }
    if info.tracks:
        for name, start in (("mean", 0.0), ("var", 1.0)):
            running = np.empty(shape)
            last = np.full(info.channels, start)
            for step in range(steps):
                running[step] = last = 0.9 * last + 0.1 * values[f"batch_{name}"][step]
            values[f"running_{name}"] = running
    return {name: value.astype(np.float32) for name, value in values.items()}


def statistics(rows: np.ndarray, absent: bool) -> np.ndarray:
    """(T, C) -> (T, 9): the recorded statistics of every step."""
    if absent:
        return np.full((len(rows), 9), np.nan, np.float32)
    finite = np.isfinite(rows)
    kept = np.where(finite, rows, np.nan)
    out = np.full((len(rows), 9), np.nan, np.float32)
    some = finite.any(1)
    if some.any():
        out[some, :7] = np.nanquantile(kept[some], [0, 0.05, 0.25, 0.5, 0.75, 0.95, 1], axis=1).T
        out[some, 7] = np.nanmean(kept[some], axis=1)
    out[:, 8] = (~finite).sum(1)
    return out


def write_run(
    path: Path,
    layers: Sequence[LayerInfo] = (),
    values: Sequence[Values] = (),
    *,
    steps: Sequence[int] | None = None,
    vectors_every: int = 1,
    probes: Mapping[int, np.ndarray] | None = None,  # step -> (B, 2, channels of all layers): mean, var
    histograms: Mapping[int, Sequence[Sequence[np.ndarray]]] | None = None,  # step -> (c, 32) of each batch and layer
    updates: Mapping[int, Sequence[Sequence[Row]]] | None = None,  # step -> of each layer, as of `sgd_steps`
    alerts: Iterable[Mapping[str, Any]] = (),
    meta: Mapping[str, Any] | None = None,
    status: str = "finished",
    arms: Sequence[str] = (),
    results: Mapping[str, Any] | None = None,
    without: Sequence[str] = (),  # quantities that never existed
) -> Path:
    """Write a run to disk and return its folder."""
    path.mkdir(parents=True)
    facts = {
        "format": 1,
        "batchnorm": "0.1.0",
        "created": "2026-01-02T03:04:05+00:00",
        "status": status,
        "layers": [info.to_json() for info in layers],
        "meta": dict(meta or {}),
    }
    if arms:
        facts["arms"] = list(arms)
    (path / "run.json").write_text(json.dumps(facts))
    if results is not None:
        (path / "results.json").write_text(json.dumps(results))
    (path / "alerts.jsonl").write_text("".join(json.dumps(dict(alert)) + "\n" for alert in alerts))
    if not layers:
        return path
    count = len(values[0]["batch_mean"])
    steps = list(range(count)) if steps is None else list(steps)
    records = np.zeros(count, stats_dtype(layers))
    records["count"], records["forwards"] = 60, 1
    for i, (info, of_layer) in enumerate(zip(layers, values, strict=True)):
        for q, name in enumerate(QUANTITIES):
            absent = (
                name in without
                or (not info.affine and name.startswith(("gamma", "beta")))
                or (not info.tracks and name.startswith("running"))
            )
            records["stats"][:, i, q] = statistics(of_layer[name], absent)
    with Journal(path / STATS) as journal:
        journal.append([(step, records[t].tobytes()) for t, step in enumerate(steps)])
    with Journal(path / VECTORS) as journal:
        for t in range(0, count, vectors_every):
            rows = [of_layer[name][t] for of_layer in values for name in QUANTITIES]
            journal.append([(steps[t], np.concatenate(rows).astype("<f4").tobytes())])
    with Journal(path / PROBES) as journal:
        for step, of_step in (probes or {}).items():
            ends = np.cumsum([info.channels for info in layers])[:-1]
            blocks = [part.reshape(len(of_step), -1) for part in np.split(of_step, ends, axis=2)]
            journal.append([(step, np.concatenate(blocks, axis=1).astype("<f4").tobytes())])
    with Journal(path / HISTOGRAMS) as journal:
        for step, counts in (histograms or {}).items():
            journal.append([(step, b"".join(histogram.encode(each) for of_batch in counts for each in of_batch))])
    kept = kept_channels(layers)
    with Journal(path / UPDATES) as journal:
        lines = Lines(path / OPTIMIZERS)
        for step, changes in (updates or {}).items():
            payload, rows = encode(step, kept, changes)
            lines.append(rows)
            journal.append([(step, payload)])
        lines.close()
    return path


def bells(layers: Sequence[LayerInfo], steps: Iterable[int], batches: int = 5) -> dict[int, list[list[np.ndarray]]]:
    """Counts of 60 normal values in each channel, for `write_run`."""
    draw = np.random.default_rng(2)
    edges = np.concatenate([[-np.inf], HISTOGRAM_EDGES[1:-1], [np.inf]])
    return {
        step: [
            [
                np.stack([np.histogram(draw.normal(size=60), edges)[0] for _ in histogram.kept_channels(i)])
                for i in layers
            ]
            for _ in range(batches)
        ]
        for step in steps
    }


def sgd_steps(values: Sequence[Values], steps: Iterable[int], lr: float = 0.5) -> dict[int, list[list[Row]]]:
    """Steps of plain SGD from gamma and beta along their gradients, for every layer that has them."""
    facts = {"lr": lr, "optimizer": "SGD", "state": "", "steps": 0, "skipped": False, "dtype": "float32"}
    return {
        step: [
            [
                (
                    q,
                    [of_layer[name][step], slope := of_layer[f"{name}_grad"][step], of_layer[name][step] - lr * slope],
                    facts,
                )
                for q, name in enumerate(("gamma", "beta"))
            ]
            for of_layer in values
        ]
        for step in steps
    }


def probe_values(steps: Sequence[int], batches: int, channels: int, seed: int = 1) -> dict[int, np.ndarray]:
    """Other batches at the same weights: (B, 2, C) a step, all of them different."""
    draw = np.random.default_rng(seed)
    return {
        step: np.stack([draw.normal(1, 0.3, (batches, channels)), draw.uniform(0.5, 2, (batches, channels))], axis=1)
        for step in steps
    }
