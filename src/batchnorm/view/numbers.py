"""The numbers behind what a run says in plain words: accuracy, speed, what moved, what was measured."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..runs.schema import COLUMNS
from .facts import plural

if TYPE_CHECKING:
    from ..runs.reader import Run

# Test accuracies that differ by less than so many standard errors are not called different.
STANDARD_ERRORS = 2.0
# The accuracy whose first time tells the fast arms from the slow.
MILESTONE = 0.9
FEW_LAYERS = 4


def accuracy(results: dict[str, Any], samples: int) -> list[str]:
    """Each arm's accuracy, and what may be concluded from it."""
    scores = {arm: found["test_accuracy"] for arm, found in results.items() if found.get("test_accuracy") is not None}
    if not scores:
        return []
    average = {"per-batch": " (average pair)"}
    listed = ", ".join(f"{arm} {percent(score)}{average.get(arm, '')}" for arm, score in scores.items())
    said = [f"Test accuracy: {listed}."]
    if len(scores) > 1 and samples:
        least = margin(list(scores.values()), samples)
        best, worst = max(scores, key=scores.__getitem__), min(scores, key=scores.__getitem__)
        gap = scores[best] - scores[worst]
        verdict = "No arm is clearly ahead at the end"
        if gap >= least:
            verdict = f"At the end {best} is {100 * gap:.1f} points above {worst}"
        rule = f"on {samples:,} test samples and with one seed, less than {100 * least:.1f} points may be chance"
        said.append(f"{verdict}: {rule}.")
    return said


def margin(scores: list[float], samples: int) -> float:
    """How far accuracies like these, each on so many samples, may lie apart by chance."""
    smoothed = [(score * samples + 1) / (samples + 2) for score in scores]  # so that an accuracy of 1 has a margin too
    return STANDARD_ERRORS * max(math.sqrt(2 * p * (1 - p) / samples) for p in smoothed)


def first_reached(results: dict[str, Any]) -> dict[str, int | None]:
    """The step by which each arm first passed the milestone; {} unless one of several did."""
    reached = {}
    for arm, found in results.items():
        curve = found.get("curve") or {}
        points = zip(curve.get("step", []), curve.get("test_accuracy", []), strict=False)
        reached[arm] = next((step for step, share in points if share is not None and share >= MILESTONE), None)
    return reached if len(reached) > 1 and any(reached.values()) else {}


def speed(results: dict[str, Any]) -> list[str]:
    """When each arm first passed the milestone."""
    reached = first_reached(results)
    if not reached:
        return []
    listed = ", ".join(f"{arm} {'never' if step is None else f'by step {step:,}'}" for arm, step in reached.items())
    every = min(found["curve"]["step"][0] for found in results.values() if (found.get("curve") or {}).get("step"))
    return [f"{percent(MILESTONE)} was first reached: {listed} (tested every {plural(every, 'step')})."]


@dataclass(frozen=True)
class Moved:
    """How far gamma and beta, as the step `step` used them, are from 1 and 0, in the layers where all is finite."""

    step: int
    gamma: np.ndarray
    beta: np.ndarray
    most: str  # name of the layer where they moved most
    still: bool  # whether they are where they began
    layers: int
    from_start: bool  # whether they were 1 and 0 at the first step that is known


def how_moved(run: Run) -> Moved | None:
    """None where no layer's gamma and beta are known of two steps, or have moved by the only one."""
    broken = not_finite(run)
    distances, most = {"gamma": [], "beta": []}, (0.0, "")
    layers = step = kept = 0
    from_start = True
    for layer in run.layers:
        steps = run.vectors(layer.name, "gamma")[0]
        known = {q: _finite(run.vectors(layer.name, q)[1]) for q in ("gamma", "beta")}
        if layer.name in broken or not all(len(vectors) for vectors in known.values()):
            continue
        layers, step, kept = layers + 1, int(steps[-1]), len(steps)
        away = {"gamma": known["gamma"].astype(np.float64) - 1, "beta": known["beta"].astype(np.float64)}
        for quantity, vectors in away.items():
            distances[quantity].append(np.abs(vectors[-1]))
            from_start &= not vectors[0].any()
        most = max(most, (float(sum(np.abs(vectors[-1]).mean() for vectors in away.values())), layer.name))
    if not layers or (most[0] == 0 and kept < 2):  # the one step that is known used what was there before it
        return None
    gamma, beta = (np.concatenate(distances[quantity]) for quantity in ("gamma", "beta"))
    return Moved(step, gamma, beta, most[1], most[0] == 0, layers, from_start)


def moved(run: Run, found: Moved | None) -> list[str]:
    """How far gamma and beta are from 1 and 0, and where they moved most."""
    if found is None:
        return []
    others = " of the other layers" if not_finite(run) else ""
    if found.still:
        still = f"Gamma and beta{others} were 1 and 0 up to step {found.step:,}, the last that is known"
        return [f"{still}; what that step made of them is not recorded."]
    gamma, beta = found.gamma, found.beta
    learned = (
        f"Learned up to step {found.step:,}: over {plural(len(gamma), 'channel')}{others} gamma moved from 1 by "
        f"{short(gamma.mean())} on average and by at most {short(gamma.max())}, beta from 0 by {short(beta.mean())} "
        f"and at most {short(beta.max())}"
    )
    return [learned + (f"; most in {found.most}." if found.layers > 1 else ".")]


def not_finite(run: Run) -> dict[str, list[str]]:
    """The layers whose gamma or beta held NaN or infinity at the last recorded step, and which of the two."""
    at = COLUMNS.index("nonfinite")
    ends = {layer.name: {q: run.stats(layer.name, q)[-1:, at] for q in ("gamma", "beta")} for layer in run.layers}
    found = {name: [q for q, count in end.items() if (count > 0).any()] for name, end in ends.items()}
    return {name: quantities for name, quantities in found.items() if quantities}


@dataclass(frozen=True)
class Measured:
    """How unlike the batches of the last probe are, at the same weights: each layer's median channel."""

    step: int
    batches: int
    shifts: dict[str, float]  # deviation of the means over batches, in standard deviations of the channel
    spreads: dict[str, float]  # deviation of the variances over batches, as a share of the variance


def how_measured(run: Run) -> Measured | None:
    """None where no two batches were measured at the same weights."""
    shifts: dict[str, float] = {}
    spreads: dict[str, float] = {}
    step = batches = 0
    for layer in run.layers:
        steps, means = run.probes(layer.name, "batch_mean")
        if not len(steps):
            continue
        mean = means[-1].astype(np.float64)
        variance = run.probes(layer.name, "batch_var")[1][-1].astype(np.float64)
        whole = np.isfinite(mean).all(1) & np.isfinite(variance).all(1)
        mean, variance = mean[whole], variance[whole]
        varied = variance.sum(0) > 0  # a dead channel has no deviation to compare with
        if len(mean) < 2 or not varied.any():
            continue
        mean, variance = mean[:, varied], variance[:, varied]
        typical = variance.mean(0)
        shifts[layer.name] = float(np.median(mean.std(0, ddof=1) / np.sqrt(typical)))
        spreads[layer.name] = float(np.median(variance.std(0, ddof=1) / typical))
        step, batches = int(steps[-1]), max(batches, len(mean))
    return Measured(step, batches, shifts, spreads) if shifts else None


def measured(run: Run, found: Measured | None) -> list[str]:
    """How unlike the batches are, and how much of that is chance."""
    if found is None:
        return []
    said = (
        f"Measured: in {found.batches} batches at the same weights (step {found.step:,}) the means of a channel differ "
        f"by {_by_layer(found.shifts, short)} of its standard deviation and the variances by "
        f"{_by_layer(found.spreads, _whole_percent)} (standard deviation over batches, median channel). Gamma and beta "
        "are the same for all of them: they move only when the optimizer steps."
    )
    return [said, *_explained(run, next(iter(found.shifts.items())))]


def _explained(run: Run, first: tuple[str, float]) -> list[str]:
    """Where the first layer has one value a sample: what drawing the samples at random does by itself."""
    name, shift = first
    counts = run.counts(name)
    count = int(counts.max()) if len(counts) else 0
    if count < 2 or count != run.meta.get("batch_size"):
        return []
    chance = 1 / math.sqrt(count)
    if not 2 / 3 < shift / chance < 3 / 2:
        return []
    return [
        f"In {name} that is what drawing {count} samples at random does to a mean: 1 / sqrt({count}) = {short(chance)}."
    ]


def pairs(results: dict[str, Any], samples: int) -> list[str]:
    """What became of one pair a batch."""
    found = results.get("per-batch") or {}
    single, spread = found.get("single_pair_accuracy"), found.get("pair_spread")
    if not single or not spread or found.get("test_accuracy") is None:
        return []
    count, steps = len(single["all"]), found.get("steps", 0)
    unlike = "How much the pairs differ is no longer a finite number."
    if None not in spread.values():
        unlike = (
            f"The pairs differ by {short(spread['gamma_std'])} in gamma and {short(spread['beta_std'])} in beta "
            "(standard deviation over pairs, mean of the channels)."
        )
    owned = (
        f"Per-batch: each of {plural(count, 'batch', 'batches')} keeps its samples and owns a gamma and "
        f"beta a channel, which moved {plural(steps // count, 'time')} in {plural(steps, 'step')}. {unlike}"
    )
    tested = (
        f"A new sample belongs to none of those batches: the average pair gets {percent(found['test_accuracy'])} "
        f"right, single pairs {percent(single['min'])} to {percent(single['max'])}, median "
        f"{percent(single['median'])}."
    )
    return [owned, tested, *_worth_it(results, samples, count)]


def _worth_it(results: dict[str, Any], samples: int, pairs: int) -> list[str]:
    """Whether owning a pair gained anything over sharing one."""
    own, shared = (results.get(arm, {}).get("test_accuracy") for arm in ("per-batch", "learned"))
    if own is None or shared is None or not samples:
        return []
    verdict = "gained nothing that this test can tell"
    if abs(own - shared) >= margin([own, shared], samples):
        verdict = f"ended {100 * abs(own - shared):.1f} points {'above' if own > shared else 'below'} one shared pair"
    return [f"Owning a pair {verdict}, for {plural(pairs, 'time')} as many gammas and betas."]


def _finite(vectors: np.ndarray) -> np.ndarray:
    """Those of (K, C) vectors that are all there."""
    return vectors[np.isfinite(vectors).all(1)] if len(vectors) else vectors


def _by_layer(values: dict[str, float], form: Callable[[float], str]) -> str:
    """Each layer's figure where there are few, else the range of them."""
    if len(values) <= FEW_LAYERS:
        return ", ".join(f"{form(value)} ({name})" for name, value in values.items())
    return f"{form(min(values.values()))} to {form(max(values.values()))}"


def short(value: float) -> str:
    """A size of at least 0, in digits that tell it from its like: 0, 1.3e-05, 0.012, 0.30, 12.34, 1e+18."""
    if value == 0:
        return "0"
    if value >= 1e5:
        return f"{value:.0e}"
    return f"{value:.2f}" if value >= 0.1 else f"{value:#.2g}"


def _whole_percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def percent(share: float) -> str:
    """A share in per cent, as every sentence says it."""
    return f"{100 * share:.1f} %"
