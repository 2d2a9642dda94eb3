"""What a run says, in sentences: for the terminal, the page and the lab alike. Every figure in them is from the run."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from ..record.run import Run

# Test accuracies that differ by less than so many standard errors are not called different.
STANDARD_ERRORS = 2.0
# The accuracy whose first time tells the fast arms from the slow.
MILESTONE = 0.9


def summarize(run: Run) -> list[str]:
    """Sentences that say what happened in a run, derived from nothing but its files.

    The accuracy of each arm and whether the differences are more than chance, how far gamma and beta moved from 1 and
    0, and how much mean and variance differ from batch to batch at the same weights. What a run does not hold is left
    out.

    Args:
        run: an experiment of several arms, or any watched run.
    """
    results = {arm: found for arm, found in (run.results.get("arms") or {}).items() if isinstance(found, dict)}
    said = _accuracy(run, results) + _speed(results)
    main = run.main
    if main.layers:
        said += _moved(main, results) + _measured(main)
    if "per-batch" in results:
        said += _pairs(results["per-batch"])
    return said + _unfinished(run, results)


def _accuracy(run: Run, results: dict[str, Any]) -> list[str]:
    """Each arm's accuracy, and what may be concluded from it."""
    scores = {arm: float(found["test_accuracy"]) for arm, found in results.items() if "test_accuracy" in found}
    if not scores:
        return []
    average = {"per-batch": " (average pair)"}
    listed = ", ".join(f"{arm} {_percent(score)}{average.get(arm, '')}" for arm, score in scores.items())
    said = [f"Test accuracy: {listed}."]
    samples = int(run.meta.get("test_samples", 0))
    if len(scores) > 1 and samples:
        margin = max(_margin(score, samples) for score in scores.values())
        best, worst = max(scores, key=scores.__getitem__), min(scores, key=scores.__getitem__)
        rule = f"on {samples:,} test samples and one seed, less than {100 * margin:.1f} points may be chance"
        if scores[best] - scores[worst] < margin:
            said.append(f"No arm is clearly ahead at the end: {rule}.")
        else:
            gap = 100 * (scores[best] - scores[worst])
            said.append(f"{_cap(best)} ended {gap:.1f} points above {worst}; {rule}.")
    lost = [arm for arm, found in results.items() if "train_loss" in found and found["train_loss"] is None]
    return said + [f"{_cap(arm)} diverged: its loss is no longer a finite number." for arm in lost]


def _margin(score: float, samples: int) -> float:
    """How far two accuracies like this one, each on so many samples, may lie apart by chance."""
    smoothed = (score * samples + 1) / (samples + 2)  # so that an accuracy of 1 has a margin too
    return STANDARD_ERRORS * math.sqrt(2 * smoothed * (1 - smoothed) / samples)


def _speed(results: dict[str, Any]) -> list[str]:
    """When each arm first passed the milestone."""
    reached = {}
    for arm, found in results.items():
        curve = found.get("curve") or {}
        points = zip(curve.get("step", []), curve.get("test_accuracy", []), strict=False)
        reached[arm] = next((step for step, accuracy in points if accuracy >= MILESTONE), None)
    if len(reached) < 2 or not any(reached.values()):
        return []
    listed = ", ".join(f"{arm} {'never' if step is None else f'by step {step:,}'}" for arm, step in reached.items())
    return [f"{_percent(MILESTONE)} was first reached: {listed} (tested once an epoch)."]


def _moved(run: Run, results: dict[str, Any]) -> list[str]:
    """How far gamma and beta are from where they began, and where they moved most."""
    distances, most, layers = {"gamma": [], "beta": []}, (0.0, ""), 0
    for layer in run.layers:
        last = {q: _last_finite(run.vectors(layer.name, q)[1]) for q in ("gamma", "beta")}
        if last["gamma"] is None or last["beta"] is None:
            continue
        layers += 1
        moved = {"gamma": last["gamma"] - 1, "beta": last["beta"]}
        for quantity, values in moved.items():
            distances[quantity].append(np.abs(values))
        size = float(np.abs(moved["gamma"]).mean() + np.abs(moved["beta"]).mean())
        most = max(most, (size, layer.name))
    if not layers:
        return []
    gamma, beta = (np.concatenate(distances[quantity]) for quantity in ("gamma", "beta"))
    said = (
        f"Learned: over {len(gamma):,} channels gamma moved from 1 by {gamma.mean():.2f} on average and by at most "
        f"{gamma.max():.2f}, beta from 0 by {beta.mean():.2f} and at most {beta.max():.2f}"
    )
    return [said + (f"; most in {most[1]}." if layers > 1 and most[0] else ".")]


def _measured(run: Run) -> list[str]:
    """How unlike the batches are at the same weights: the last probe, each layer's median channel."""
    shifts, spreads, step, batches, per_channel = [], [], 0, 0, set()
    for layer in run.layers:
        steps, means = run.probes(layer.name, "batch_mean")
        _, variances = run.probes(layer.name, "batch_var")
        if not len(steps):
            continue
        mean, variance = means[-1].astype(np.float64), variances[-1].astype(np.float64)
        there = np.isfinite(mean).all(1) & np.isfinite(variance).all(1)
        mean, variance = mean[there], variance[there]
        alive = variance.mean(0) > 0 if len(variance) else np.zeros(0, bool)
        if len(mean) < 2 or not alive.any():
            continue
        typical = variance.mean(0)[alive]
        shifts.append(float(np.median(mean.std(0, ddof=1)[alive] / np.sqrt(typical))))
        spreads.append(float(np.median(variance.std(0, ddof=1)[alive] / typical)))
        step, batches = int(steps[-1]), max(batches, len(mean))
        counts = run.counts(layer.name)
        per_channel.add(int(counts.max()) if len(counts) else 0)
    if not shifts:
        return []
    said = (
        f"Measured: {batches} batches at the same weights (step {step:,}) give each channel {batches} means, which "
        f"differ by {_span(shifts, '{:.2f}')} of its standard deviation, and {batches} variances, which differ by "
        f"{_span([100 * s for s in spreads], '{:.0f}')} % (standard deviation over batches, median channel of each "
        "layer). Gamma and beta are the same for all of them."
    )
    return [said, *_explained(shifts, per_channel)]


def _explained(shifts: list[float], per_channel: set[int]) -> list[str]:
    """Where every layer has one value a sample: what drawing the samples at random does by itself."""
    count = max(per_channel)
    if len(per_channel) != 1 or count < 2:
        return []
    chance = 1 / math.sqrt(count)
    if max(shifts) > 1.5 * chance or min(shifts) < chance / 1.5:
        return []
    return [f"That is what drawing {count} values at random does: 1 / sqrt({count}) = {chance:.2f}."]


def _pairs(found: dict[str, Any]) -> list[str]:
    """What became of one pair a batch."""
    single, spread = found.get("single_pair_accuracy"), found.get("pair_spread")
    if not single or not spread:
        return []
    pairs = len(single["all"])
    said = (
        f"Per-batch: each of {pairs} batches owns its gamma and beta, moved once an epoch. The pairs differ by "
        f"{spread['gamma_std']:.3f} in gamma and {spread['beta_std']:.3f} in beta (standard deviation over pairs, mean "
        "of the channels)."
    )
    tested = (
        f"A new sample belongs to none of the batches: with the average pair {_percent(found['test_accuracy'])} are "
        f"right, with single pairs {_percent(single['min'])} to {_percent(single['max'])}, median "
        f"{_percent(single['median'])}."
    )
    return [said, tested]


def _unfinished(run: Run, results: dict[str, Any]) -> list[str]:
    """Which arms have no results yet."""
    missing = [arm for arm in run.meta.get("arms") or [] if arm not in results]
    return [f"No results yet from {', '.join(missing)}: the run is {run.status}."] if missing else []


def _last_finite(vectors: np.ndarray) -> np.ndarray | None:
    """The last of (K, C) vectors that is all there."""
    whole = np.flatnonzero(np.isfinite(vectors).all(1)) if len(vectors) else np.zeros(0, int)
    return vectors[whole[-1]] if len(whole) else None


def _span(values: list[float], pattern: str) -> str:
    low, high = pattern.format(min(values)), pattern.format(max(values))
    return low if low == high else f"{low} to {high}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _cap(name: str) -> str:
    return name[:1].upper() + name[1:]
