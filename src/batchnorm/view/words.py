"""What a run says, in sentences: for the terminal, the page and the lab alike. Every figure in them is from the run."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from ..runs.schema import COLUMNS
from .facts import plural, test_samples

if TYPE_CHECKING:
    from ..runs.reader import Run

# Test accuracies that differ by less than so many standard errors are not called different.
STANDARD_ERRORS = 2.0
# The accuracy whose first time tells the fast arms from the slow.
MILESTONE = 0.9
FEW_LAYERS = 4


def summarize(run: Run) -> list[str]:
    """Sentences that say what happened in a run, derived from nothing but its files.

    The accuracy of each arm and whether the differences are more than chance, how far gamma and beta moved from 1 and
    0, and how much mean and variance differ from batch to batch at the same weights. What a run does not hold is left
    out.

    Args:
        run: an experiment of several arms, or any watched run.
    """
    results = run.results.get("arms") or {}
    samples = test_samples(run)
    said = _experiment(run) + _accuracy(results, samples) + _speed(results)
    if run.main.layers:
        said += _moved(run.main) + _measured(run.main)
    return said + _pairs(results, samples) + _unfinished(run, results)


def _experiment(run: Run) -> list[str]:
    """What could learn, where that was not all."""
    if run.meta.get("experiment") != "gamma-beta" or not run.main.layers:
        return []
    numbers = 2 * sum(layer.channels for layer in run.main.layers)
    return [
        f"Only gamma and beta learned, {numbers:,} numbers shared by all batches; every weight stayed at its random "
        "initial value, and in the arm fixed nothing learned at all."
    ]


def _accuracy(results: dict[str, Any], samples: int) -> list[str]:
    """Each arm's accuracy, and what may be concluded from it."""
    scores = {arm: found["test_accuracy"] for arm, found in results.items() if found.get("test_accuracy") is not None}
    if not scores:
        return []
    average = {"per-batch": " (average pair)"}
    listed = ", ".join(f"{arm} {_percent(score)}{average.get(arm, '')}" for arm, score in scores.items())
    said = [f"Test accuracy: {listed}."]
    if len(scores) > 1 and samples:
        margin = _margin(list(scores.values()), samples)
        best, worst = max(scores, key=scores.__getitem__), min(scores, key=scores.__getitem__)
        gap = scores[best] - scores[worst]
        verdict = "No arm is clearly ahead at the end"
        if gap >= margin:
            verdict = f"At the end {best} is {100 * gap:.1f} points above {worst}"
        rule = f"on {samples:,} test samples and with one seed, less than {100 * margin:.1f} points may be chance"
        said.append(f"{verdict}: {rule}.")
    lost = [arm for arm, found in results.items() if "train_loss" in found and found["train_loss"] is None]
    return said + [f"The arm {arm} diverged: its loss is no longer a finite number." for arm in lost]


def _margin(scores: list[float], samples: int) -> float:
    """How far accuracies like these, each on so many samples, may lie apart by chance."""
    smoothed = [(score * samples + 1) / (samples + 2) for score in scores]  # so that an accuracy of 1 has a margin too
    return STANDARD_ERRORS * max(math.sqrt(2 * p * (1 - p) / samples) for p in smoothed)


def _speed(results: dict[str, Any]) -> list[str]:
    """When each arm first passed the milestone."""
    reached = {}
    for arm, found in results.items():
        curve = found.get("curve") or {}
        points = zip(curve.get("step", []), curve.get("test_accuracy", []), strict=False)
        reached[arm] = next((step for step, accuracy in points if accuracy is not None and accuracy >= MILESTONE), None)
    if len(reached) < 2 or not any(reached.values()):
        return []
    listed = ", ".join(f"{arm} {'never' if step is None else f'by step {step:,}'}" for arm, step in reached.items())
    return [f"{_percent(MILESTONE)} was first reached: {listed} (tested once an epoch)."]


def _moved(run: Run) -> list[str]:
    """How far gamma and beta, as the last steps used them, are from 1 and 0, and where they moved most."""
    broken = _not_finite(run)
    distances, most = {"gamma": [], "beta": []}, (0.0, "")
    layers = step = kept = 0
    for layer in run.layers:
        steps = run.vectors(layer.name, "gamma")[0]
        last = {q: _last_finite(run.vectors(layer.name, q)[1]) for q in ("gamma", "beta")}
        if last["gamma"] is None or last["beta"] is None or layer.name in broken:
            continue
        layers, step, kept = layers + 1, int(steps[-1]), len(steps)
        moved = {"gamma": last["gamma"].astype(np.float64) - 1, "beta": last["beta"].astype(np.float64)}
        for quantity, values in moved.items():
            distances[quantity].append(np.abs(values))
        size = float(np.abs(moved["gamma"]).mean() + np.abs(moved["beta"]).mean())
        most = max(most, (size, layer.name))
    said = []
    if broken:
        names = ", ".join(f"{' and '.join(quantities)} of {name}" for name, quantities in broken.items())
        said = [f"Not finite at the end (step {int(run.steps[-1]):,}): {names}."]
    if not layers or (most[0] == 0 and kept < 2):  # the one step that is known used what was there before it
        return said
    others = " of the other layers" if broken else ""
    if most[0] == 0:
        still = f"Gamma and beta{others} were 1 and 0 up to step {step:,}, the last that is known"
        return [*said, f"{still}; what that step made of them is not recorded."]
    gamma, beta = (np.concatenate(distances[quantity]) for quantity in ("gamma", "beta"))
    learned = (
        f"Learned up to step {step:,}: over {plural(len(gamma), 'channel')}{others} gamma moved from 1 by "
        f"{_short(gamma.mean())} on average and by at most {_short(gamma.max())}, beta from 0 by {_short(beta.mean())} "
        f"and at most {_short(beta.max())}"
    )
    return [*said, learned + (f"; most in {most[1]}." if layers > 1 else ".")]


def _not_finite(run: Run) -> dict[str, list[str]]:
    """The layers whose gamma or beta held NaN or infinity at the last recorded step, and which of the two."""
    at = COLUMNS.index("nonfinite")
    ends = {layer.name: {q: run.stats(layer.name, q)[-1:, at] for q in ("gamma", "beta")} for layer in run.layers}
    found = {name: [q for q, count in end.items() if (count > 0).any()] for name, end in ends.items()}
    return {name: quantities for name, quantities in found.items() if quantities}


def _measured(run: Run) -> list[str]:
    """How unlike the batches are at the same weights: the last probe, each layer's median channel."""
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
    if not shifts:
        return []
    said = (
        f"Measured: in {batches} batches at the same weights (step {step:,}) the means of a channel differ by "
        f"{_by_layer(shifts, _short)} of its standard deviation and the variances by "
        f"{_by_layer(spreads, _whole_percent)} (standard deviation over batches, median channel). Gamma and beta "
        "are the same for all of them: they move only when the optimizer steps."
    )
    return [said, *_explained(run, next(iter(shifts.items())))]


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
        f"In {name} that is what drawing {count} samples at random does to a mean: "
        f"1 / sqrt({count}) = {_short(chance)}."
    ]


def _pairs(results: dict[str, Any], samples: int) -> list[str]:
    """What became of one pair a batch."""
    found = results.get("per-batch") or {}
    single, spread = found.get("single_pair_accuracy"), found.get("pair_spread")
    if not single or not spread or found.get("test_accuracy") is None:
        return []
    pairs, steps = len(single["all"]), found.get("steps", 0)
    unlike = "How much the pairs differ is no longer a finite number."
    if None not in spread.values():
        unlike = (
            f"The pairs differ by {_short(spread['gamma_std'])} in gamma and {_short(spread['beta_std'])} in beta "
            "(standard deviation over pairs, mean of the channels)."
        )
    owned = (
        f"Per-batch: each of {pairs:,} {'batch' if pairs == 1 else 'batches'} keeps its samples and owns a gamma and "
        f"beta a channel, which moved {plural(steps // pairs, 'time')} in {plural(steps, 'step')}. {unlike}"
    )
    tested = (
        f"A new sample belongs to none of those batches: the average pair gets {_percent(found['test_accuracy'])} "
        f"right, single pairs {_percent(single['min'])} to {_percent(single['max'])}, median "
        f"{_percent(single['median'])}."
    )
    return [owned, tested, *_worth_it(results, samples, pairs)]


def _worth_it(results: dict[str, Any], samples: int, pairs: int) -> list[str]:
    """Whether owning a pair gained anything over sharing one."""
    own, shared = (results.get(arm, {}).get("test_accuracy") for arm in ("per-batch", "learned"))
    if own is None or shared is None or not samples:
        return []
    verdict = "gained nothing that this test can tell"
    if abs(own - shared) >= _margin([own, shared], samples):
        verdict = f"ended {100 * abs(own - shared):.1f} points {'above' if own > shared else 'below'} one shared pair"
    return [f"Owning a pair {verdict}, for {plural(pairs, 'time')} as many gammas and betas."]


def _unfinished(run: Run, results: dict[str, Any]) -> list[str]:
    """Which arms have no results yet."""
    arms = run.meta.get("arms")
    missing = [arm for arm in arms if isinstance(arm, str) and arm not in results] if isinstance(arms, list) else []
    return [f"No results yet from {', '.join(missing)}: the run is {run.status}."] if missing else []


def _last_finite(vectors: np.ndarray) -> np.ndarray | None:
    """The last of (K, C) vectors that is all there."""
    whole = np.flatnonzero(np.isfinite(vectors).all(1)) if len(vectors) else np.zeros(0, int)
    return vectors[whole[-1]] if len(whole) else None


def _by_layer(values: dict[str, float], form: Callable[[float], str]) -> str:
    """Each layer's figure where there are few, else the range of them."""
    if len(values) <= FEW_LAYERS:
        return ", ".join(f"{form(value)} ({name})" for name, value in values.items())
    return f"{form(min(values.values()))} to {form(max(values.values()))}"


def _short(value: float) -> str:
    """A size of at least 0, in digits that tell it from its like: 0, 1.3e-05, 0.012, 0.30, 12.34, 1e+18."""
    if value == 0:
        return "0"
    if value >= 1e5:
        return f"{value:.0e}"
    return f"{value:.2f}" if value >= 0.1 else f"{value:#.2g}"


def _whole_percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
