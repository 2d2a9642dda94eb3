"""What a run says, in plain sentences and in numbers, for terminal, page and --json. Every figure is the run's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from . import numbers
from .facts import GAMMA_BETA, plural, test_samples
from .numbers import percent, short

if TYPE_CHECKING:
    from ..runs.reader import Run

PLAIN = 5


@dataclass(frozen=True)
class Words:
    """What a run says.

    Attributes:
        plain: at most five sentences for a reader who does not know how gamma and beta are learned; what matters most
            comes first, so whoever has less room takes the first of them.
        numbers: the numbers behind those, a sentence or two each, for a reader who wants them.
    """

    plain: list[str]
    numbers: list[str]


def summarize(run: Run) -> Words:
    """What happened in a run, derived from nothing but its files; what a run does not hold is left out.

    The plain sentences say, in this order: what went wrong, if anything did; that batches are measured anew; that gamma
    and beta go on from where they were; what the arms of an experiment show of it, or how far gamma and beta have come
    and what becomes of the measured ones in eval mode. The numbers are the accuracy of each arm and whether the
    differences are more than chance, how far gamma and beta moved from 1 and 0, how much mean and variance differ from
    batch to batch at the same weights, and what one pair a batch was worth.

    Args:
        run: an experiment of several arms, or any watched run.
    """
    results = run.results.get("arms") or {}
    samples = test_samples(run)
    moved = numbers.how_moved(run.main) if run.main.layers else None
    measured = numbers.how_measured(run.main) if run.main.layers else None
    plain = [
        *_trouble(run, results),
        *_answer(run.main, moved, measured),
        *_shown(run, results, samples),
        *_distance(moved),
        *_in_eval(run),
    ]
    behind = [
        *numbers.accuracy(results, samples),
        *numbers.speed(results),
        *numbers.moved(run.main, moved),
        *numbers.measured(run.main, measured),
        *numbers.pairs(results, samples),
    ]
    return Words(plain[:PLAIN], behind)


def _trouble(run: Run, results: dict[str, Any]) -> list[str]:
    """What the reader has to know before all else."""
    said = []
    broken = numbers.not_finite(run.main) if run.main.layers else {}
    if broken:
        names = ", ".join(f"{' and '.join(quantities)} of {name}" for name, quantities in broken.items())
        said.append(f"Not finite at the end (step {int(run.main.steps[-1]):,}): {names}.")
    lost = [arm for arm, found in results.items() if "train_loss" in found and found["train_loss"] is None]
    said += [f"The arm {arm} diverged: its loss is no longer a finite number." for arm in lost]
    arms = run.meta.get("arms")
    missing = [arm for arm in arms if isinstance(arm, str) and arm not in results] if isinstance(arms, list) else []
    return said + ([f"No results yet from {', '.join(missing)}: the run is {run.status}."] if missing else [])


def _answer(run: Run, moved: numbers.Moved | None, measured: numbers.Measured | None) -> list[str]:
    """Why gamma and beta can be learned although each batch is measured anew."""
    said = []
    if measured and min(measured.shifts.values()) > 0:
        count = measured.batches
        said.append(
            f"Only the mean and the variance are computed anew for each batch: {count} batches, put through the same "
            f"network, had {count} different means, but shared one gamma and one beta in each channel."
        )
    if moved and not moved.still and run.meta.get("arm") != "per-batch":
        taken = run.recorded.get("steps")
        steps = plural(taken if isinstance(taken, int) else moved.step, "step")
        began = "they started at 1 and 0, and " if moved.from_start else ""
        said.append(
            f"Gamma and beta are learned like any other weight: {began}{steps} moved them, "
            "each from where the one before had left them."
        )
    return said


def _shown(run: Run, results: dict[str, Any], samples: int) -> list[str]:
    """What the arms of an experiment show."""
    scores = {arm: found["test_accuracy"] for arm, found in results.items() if found.get("test_accuracy") is not None}
    if run.meta.get("learns") == GAMMA_BETA and "learned" in scores:
        return _alone(run, results, scores, samples)
    return [*_compared(results, scores, samples), *_sooner(results), *_steadier(results), *_all_learned(run, scores)]


def _alone(run: Run, results: dict[str, Any], scores: dict[str, float], samples: int) -> list[str]:
    """Where nothing but gamma and beta could learn."""
    learned = 2 * sum(layer.channels for layer in run.main.layers)
    said = [
        f"Nothing else learned here: every other weight kept its random value, and these {learned:,} numbers alone "
        f"got {percent(scores['learned'])} of {_new(samples)} right."
    ]
    if "fixed" in scores:
        lesson = "measuring teaches nothing" if _differ(scores, "learned", "fixed", samples) > 0 else _CLOSE
        said.append(
            "With gamma and beta kept at 1 and 0, every batch was measured just the same, and "
            f"{percent(scores['fixed'])} came out right: {lesson}."
        )
    single = (results.get("per-batch") or {}).get("single_pair_accuracy")
    if single:
        batches = plural(len(single["all"]), "batch", "batches")
        said.append(
            f"When each of {batches} owned a gamma and a beta instead, one such pair got from {percent(single['min'])} "
            f"to {percent(single['max'])} right: it had learned from its own batch alone, and a new sample belongs to "
            "no batch."
        )
    return said


_CLOSE = "too close for this test to tell apart"
_HOW = {
    "fixed": "with both kept at 1 and 0",
    "per-batch": "with a pair for each batch, their average",
    "none": "without batch norm",
}


def _compared(results: dict[str, Any], scores: dict[str, float], samples: int) -> list[str]:
    """What came out right in each arm."""
    if "learned" not in scores:
        return [
            f"{percent(score)} of {_new(samples)} came out right {_HOW[arm]}."
            for arm, score in scores.items()
            if arm in _HOW
        ]
    said = f"With gamma and beta learned, {percent(scores['learned'])} of {_new(samples)} came out right"
    others = [f"{_HOW[arm]}, {percent(score)}" for arm, score in scores.items() if arm in _HOW]
    if not others:
        return [f"{said}."]
    apart = [arm for arm in scores if arm in _HOW and _differ(scores, "learned", arm, samples)]
    verdict = "" if apart or not samples else f": {_CLOSE}"
    return [f"{said}; {'; '.join(others)}{verdict}."]


def _sooner(results: dict[str, Any]) -> list[str]:
    """What batch norm does whether gamma and beta are learned or not."""
    reached = numbers.first_reached(results)
    if not {"learned", "none"} <= reached.keys():
        return []
    with_it, without = (
        "never" if step is None else f"by step {step:,}" for step in map(reached.get, ("learned", "none"))
    )
    return [f"{percent(numbers.MILESTONE)} was first reached {with_it} with batch norm, and {without} without it."]


def _steadier(results: dict[str, Any]) -> list[str]:
    """What reached a hidden unit, where that was followed."""
    grown = {arm: _widened(results.get(arm, {}).get("curve") or {}) for arm in ("learned", "none")}
    if not all(grown.values()):
        return []
    return [
        "From the first test to the last, the middle 70 % of what reached one sigmoid of the last hidden layer became "
        f"{short(grown['learned'])} times as wide with batch norm, and {short(grown['none'])} times without it."
    ]


def _widened(curve: dict[str, Any]) -> float:
    """How many times the first width, of the middle 70 %, the last one is; 0 where nobody can tell."""
    ends = [curve[name][at] for at in (0, -1) for name in ("input_p15", "input_p85") if curve.get(name)]
    if len(ends) < 4 or None in ends or ends[1] <= ends[0]:
        return 0.0
    return (ends[3] - ends[2]) / (ends[1] - ends[0])


def _all_learned(run: Run, scores: dict[str, float]) -> list[str]:
    """Why an experiment in which all learns shows little of gamma and beta."""
    if run.meta.get("learns") != "all" or not {"learned", "fixed"} <= scores.keys():
        return []
    return ["All the other weights learned here too, and they can do much of what gamma and beta do."]


def _distance(moved: numbers.Moved | None) -> list[str]:
    if not moved or moved.still:
        return []
    gamma, beta = short(moved.gamma.mean()), short(moved.beta.mean())
    return [f"At the last known step gamma was {gamma} away from 1 on average, and beta {beta} away from 0."]


def _in_eval(run: Run) -> list[str]:
    """What becomes of the measured numbers when the network is used."""
    if not any(layer.tracks for layer in run.main.layers):
        return []
    return [
        "In eval mode no batch is measured: the running mean and variance, averages over the batches seen, are used "
        "instead, and gamma and beta stay as they were learned."
    ]


def _differ(scores: dict[str, float], one: str, other: str, samples: int) -> int:
    """1 or -1 where the first is above or below the other by more than chance, else 0."""
    gap = scores[one] - scores[other]
    if not samples or abs(gap) < numbers.margin([scores[one], scores[other]], samples):
        return 0
    return 1 if gap > 0 else -1


def _new(samples: int) -> str:
    return plural(samples, "new sample") if samples else "new samples"
