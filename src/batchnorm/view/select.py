"""What of a run the page shows: the channels and steps that fit it, as columns, and in words what was left out.

A page holds a few hundred thousand numbers; a run may hold billions. Steps are thinned evenly, so every point drawn is
a recorded one, never an average of several; channels are taken evenly down the ranking by how far γ and β moved.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ..runs.schema import COLUMNS, PROBED, QUANTITIES
from .facts import NONFINITE

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..runs.reader import Run
    from ..runs.schema import LayerInfo

BANDS = ("p05", "p25", "p50", "p75", "p95")
BAND_COLUMNS = [COLUMNS.index(name) for name in BANDS]

TRACE_VALUES = 120_000  # float32 values, all channels and quantities together: 0.64 MB in base64
PROBE_VALUES = 40_000
BAND_VALUES = 60_000
MAX_CHANNELS, MAX_STEPS, MAX_PROBED, MAX_BATCHES = 12, 240, 12, 16

# γ and β of the batch of each step, in the arm of an experiment in which every batch has its own.
OWNED = {"own_gamma": "gamma", "own_beta": "beta"}
OWNING_ARM = "per-batch"

# What the layer's crosses stand for.
ROLES = {
    "measured": ("batch_mean", "batch_var"),
    "learned": ("gamma", "beta"),
    "gradient": ("gamma_grad", "beta_grad"),
}


@dataclass(frozen=True)
class LayerView:
    """One layer as the page shows it."""

    info: LayerInfo
    channels: NDArray[np.int64]  # (c,) which channels, those that moved most first
    moved: NDArray[np.float64]  # (c,) how far (γ, β) went from its first to its last recorded value
    columns: dict[str, NDArray[np.float32]]  # quantity, or one of OWNED, -> (S, c); NaN where there is none
    counts: NDArray[np.int64]  # (S,) values per channel in the batch
    broken: dict[str, list[int]]  # quantity -> which of the S steps had a value that was not finite
    probes: dict[str, NDArray[np.float32]]  # batch_mean, batch_var -> (P, B, c)
    bands: dict[str, NDArray[np.float32]]  # gamma, beta -> (T, 5)


@dataclass(frozen=True)
class Selection:
    """What the page shows of one run."""

    run: Run
    steps: NDArray[np.int64]  # (S,)
    probe_steps: NDArray[np.int64]  # (P,)
    band_steps: NDArray[np.int64]  # (T,)
    layers: list[LayerView]
    first: tuple[int, int] = (0, 0)  # the layer and place among its channels to look at first
    notes: list[str] = field(default_factory=list)
    bad_step: int | None = None  # the first shown step with a value that was not finite

    def trace(self, layer: int, place: int) -> list[dict[str, Any]]:
        """Return the rows of the `trace` data set of one channel (see charts.panels)."""
        view = self.layers[layer]
        rows = []
        for s, step in enumerate(self.steps.tolist()):
            values = {q: _finite(column[s, place]) for q, column in view.columns.items()}
            bad = [r for r, qs in ROLES.items() if any(s in view.broken[q] and values[q] is None for q in qs)]
            rows.append({"step": step, **values, "broken": " ".join(bad)})
        return rows

    def probes(self, layer: int, place: int) -> list[dict[str, Any]]:
        """Return the rows of the `probes` data set of one channel: γ and β are those of the nearest shown step."""
        view = self.layers[layer]
        return [
            {
                "step": int(step),
                "batch": b + 1,
                **{q: _finite(v[p, b, place]) for q, v in view.probes.items()},
                **{q: _finite(view.columns[q][nearest(self.steps, step), place]) for q in ("gamma", "beta")},
            }
            for p, step in enumerate(self.probe_steps)
            for b in range(view.probes["batch_mean"].shape[1])
        ]


def nearest(steps: NDArray[np.int64], step: int) -> int:
    """Return the index of the step nearest to the given one."""
    return int(np.abs(steps - step).argmin())


def thin(n: int, limit: int) -> NDArray[np.int64]:
    """Return at most `limit` indices of range(n), evenly spaced, the first and the last among them."""
    return np.unique(np.linspace(0, max(n - 1, 0), min(n, limit)).round().astype(np.int64))


def pack(values: NDArray[np.float32]) -> str:
    """Return float32 numbers, little-endian and row by row, in base64."""
    return base64.b64encode(np.ascontiguousarray(values, "<f4").tobytes()).decode()


def select(
    run: Run, only: tuple[str, int | None] | None = None, shown: Mapping[str, Sequence[int]] | None = None
) -> Selection:
    """Return what the page shows of a run (of an experiment: of `run.main`), or one layer or channel of it.

    Args:
        run: a run from `open_run`.
        only: name of a layer and number of a channel, to have these alone; None for the layer's channels.
        shown: channels to take of a layer, in place of those that moved most.
    Raises:
        ValueError: there is no such layer or channel.
    """
    owning = run.arms.get(OWNING_ARM)
    run = run.main
    infos = run.layers
    if only is not None:
        infos = [info for info in infos if info.name == only[0]]
        if not infos or (only[1] is not None and not 0 <= only[1] < infos[0].channels):
            there = ", ".join(f"{info.name} ({info.channels} channels)" for info in run.layers) or "none"
            which = "" if only[1] is None else f"channel {only[1]} of a "
            raise ValueError(f"no {which}layer {only[0]!r} in {run.path}; its layers: {there}")
    if not infos:
        none = np.empty(0, np.int64)
        return Selection(run, none, none, none, [])
    size, quantities = len(infos), len(QUANTITIES) + (len(OWNED) if owning else 0)
    places = int(np.clip(TRACE_VALUES // (size * quantities * MAX_STEPS // 2), 1, MAX_CHANNELS))
    limit = int(np.clip(TRACE_VALUES // (size * quantities * places), 10, MAX_STEPS))

    # A torn file can leave vectors without statistics of the same step, or the other way round.
    recorded = np.intersect1d(run.vectors(infos[0].name, "batch_mean")[0], run.steps)
    probed, of_probes = run.probes(infos[0].name, "batch_mean")
    there = of_probes.shape[1]
    if not len(recorded):
        probed = probed[:0]
    each = size * places * len(PROBED) * max(1, min(there, MAX_BATCHES))
    probe_steps = probed[thin(len(probed), int(np.clip(PROBE_VALUES // each, 2, MAX_PROBED)))]
    bad = _first_broken(run, recorded)
    kept = {*thin(len(recorded), limit).tolist(), *([] if bad is None else [bad])}
    # The step after a probed one is there as well: one click shows what one gradient did.
    kept |= {at for step in probe_steps for at in (nearest(recorded, step), nearest(recorded, step) + 1)}
    steps = recorded[sorted(at for at in kept if at < len(recorded))]
    rows = thin(len(run.steps), int(np.clip(BAND_VALUES // (size * 2 * len(BANDS)), 20, MAX_STEPS)))

    wanted = dict(shown or {}) if only is None else {} if only[1] is None else {only[0]: [only[1]]}
    layers = [_view(run, info, steps, probe_steps, rows, places, wanted.get(info.name)) for info in infos]
    if owning is not None and owning is not run and len(steps):
        for view in layers:
            if view.info in owning.layers:
                for name, quantity in OWNED.items():
                    whole = owning.vectors(view.info.name, quantity)
                    view.columns[name] = _pick(*whole, steps)[:, view.channels]
    notes = []
    if len(rows) < len(run.steps):
        notes.append(f"Bands per layer: {len(rows)} of {len(run.steps):,} recorded steps, evenly spaced.")
    if len(steps) < len(recorded):
        notes.append(
            f"Single channels: {len(steps)} of {len(recorded):,} steps that hold whole vectors, evenly spaced."
        )
    if len(recorded) < len(run.steps):
        notes.append(f"The recorder kept whole vectors at {len(recorded):,} of {len(run.steps):,} recorded steps.")
    if len(probe_steps) < len(probed) or there > MAX_BATCHES:
        notes.append(f"Probes: {len(probe_steps)} of {len(probed)}, at most {MAX_BATCHES} of {there} batches each.")
    if any(len(view.channels) < view.info.channels for view in layers):
        notes.append(
            f"Channels: at most {places} a layer, taken evenly from the one whose γ and β moved most to the one "
            "that moved least."
        )
    first = _first(layers) if bad is None else _first_bad(layers, int(np.searchsorted(steps, recorded[bad])))
    return Selection(
        run, steps, probe_steps, run.steps[rows], layers, first, notes, None if bad is None else int(recorded[bad])
    )


def _first_broken(run: Run, recorded: NDArray[np.int64]) -> int | None:
    """Return which of the steps with whole vectors is the first, or comes first after it, with a value not finite."""
    broken = [run.steps[(run.nonfinite(info.name) > 0).any(1)] for info in run.layers]
    first = min((steps[0] for steps in broken if len(steps)), default=None)
    if first is None or not len(recorded):
        return None
    return min(int(np.searchsorted(recorded, first)), len(recorded) - 1)


def _first_bad(layers: list[LayerView], at: int) -> tuple[int, int]:
    """Return the layer and place of the channel to look at first where a value was not finite: one that had it."""
    for i, view in enumerate(layers):
        for quantity, column in view.columns.items():
            if at in view.broken.get(quantity, ()):
                return i, int((~np.isfinite(column[at])).argmax())
    return _first(layers)


def _view(
    run: Run,
    info: LayerInfo,
    steps: NDArray[np.int64],
    probe_steps: NDArray[np.int64],
    rows: NDArray[np.int64],
    places: int,
    wanted: Sequence[int] | None,
) -> LayerView:
    name = info.name
    whole = {q: run.vectors(name, q) for q in QUANTITIES} if len(steps) else {}
    channels = thin(info.channels, places) if wanted is None else np.array(wanted, np.int64)
    moved = np.zeros(len(channels))
    if info.affine and whole:
        of_all = np.hypot(_travel(whole["gamma"][1]), _travel(whole["beta"][1]))
        if wanted is None:
            channels = np.argsort(-of_all, kind="stable")[channels]
        moved = of_all[channels]
    at = np.searchsorted(run.steps, steps)
    return LayerView(
        info=info,
        channels=channels,
        moved=moved,
        columns={q: _pick(have, values[:, channels], steps) for q, (have, values) in whole.items()},
        counts=run.counts(name)[at],
        broken={q: np.flatnonzero(run.stats(name, q)[at, NONFINITE] > 0).tolist() for q in QUANTITIES},
        probes={q: _pick(*run.probes(name, q), probe_steps)[:, :MAX_BATCHES, channels] for q in PROBED},
        bands={q: run.stats(name, q)[rows][:, BAND_COLUMNS] for q in ROLES["learned"]} if info.affine else {},
    )


def _pick(have: NDArray[np.int64], values: NDArray[np.float32], want: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return the values at the steps wanted, NaN at steps that were not recorded."""
    picked = np.full((len(want), *values.shape[1:]), np.nan, np.float32)
    at = np.searchsorted(have, want)
    found = at < len(have)
    found[found] = have[at[found]] == want[found]
    picked[found] = values[at[found]]
    return picked


def _travel(values: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return how far each channel of (K, C) went from its first finite value to its last; 0 if it has none."""
    finite = np.isfinite(values)
    some = finite.any(0)
    if not some.any():
        return np.zeros(values.shape[1])
    channel = np.arange(values.shape[1])
    start = values[finite.argmax(0), channel]
    end = values[len(values) - 1 - finite[::-1].argmax(0), channel]
    return np.where(some, end.astype(float) - start, 0.0)


def _first(layers: list[LayerView]) -> tuple[int, int]:
    """Return the layer and place of the channel to look at first: where both halves of the story are to be seen.

    That is where (γ, β) moved far and the batch means jump, from one shown step to the next, by much of a standard
    deviation. A channel where either is small would show half of it; in a tie the earliest layer wins.
    """
    best, found = -1.0, (0, 0)
    for i, view in enumerate(layers):
        if not view.columns:
            continue
        means, variances = (view.columns[q].astype(np.float64) for q in PROBED)
        for place, moved in enumerate(view.moved):
            with np.errstate(invalid="ignore"):  # infinities, negative variances
                jumps = np.abs(np.diff(means[:, place]))
                jump = _median(jumps) / max(np.sqrt(_median(variances[:, place])), 1e-12)
            if moved * jump > best:
                best, found = moved * jump, (i, place)
    return found


def _median(values: NDArray[np.float64]) -> float:
    """Return the median of the finite values; 0 if there is none."""
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if len(finite) else 0.0


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
