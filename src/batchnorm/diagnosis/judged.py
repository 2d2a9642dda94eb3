"""Judged: how much was judged, by which rules, and what could not be judged and why."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..view.facts import plural
from .rules import RULES
from .rules.rule import Rule

# What a rule needs, as `Rule.needs` and `Rule.sources` say it, in words.
_WORDS = {
    "values": ("a checkpoint",),
    "settings": ("a model", "a run"),
    "place": ("a model",),
    "optimizer": ("optimizer=",),
    "run": ("a run",),
    "measured": ("batches",),
    "modes": ("batches with loss=",),
    "copies": ("several ranks",),
}


@dataclass(frozen=True)
class Judged:
    """How much was judged.

    Attributes:
        layers: batch-norm layers, in all sources.
        steps: recorded steps of runs; None without a run.
        batches: None without any.
        rules: names of those that could judge.
        missed: what could not be judged and why, a sentence each.
        nothing: whether a source held nothing that could be judged.
    """

    layers: int = 0
    steps: int | None = None
    batches: int | None = None
    rules: tuple[str, ...] = ()
    missed: tuple[str, ...] = ()
    nothing: bool = False

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def lines(self) -> list[str]:
        """As a report says it."""
        amounts = [plural(self.layers, "layer")]
        if self.steps is not None:
            amounts.append(plural(self.steps, "recorded step"))
        if self.batches is not None:
            amounts.append(plural(self.batches, "batch", "batches"))
        said = f"Judged: {', '.join(amounts)}, by {plural(len(self.rules), 'rule')}"
        lines = [f"{said}: {', '.join(self.rules)}." if self.rules else f"{said}."]
        return [*lines, f"Not judged: {'; '.join(self.missed)}."] if self.missed else lines


def judged(
    known: Iterable[str], layers: int, steps: int | None, batches: int | None, missed: Sequence[str], nothing: bool
) -> Judged:
    """What can be said of a diagnosis that knew so much: "values", "settings", ... as in `_WORDS`."""
    known = set(known)
    could = [rule for rule in RULES if known.intersection(_needs(rule))]
    without: dict[str, list[str]] = {}
    for rule in RULES:
        if rule not in could:
            words = " or ".join(dict.fromkeys(word for need in _needs(rule) for word in _WORDS[need]))
            without.setdefault(words, []).append(rule.name)
    for words, names in without.items():
        missed = [*missed, f"{', '.join(names)} {'needs' if len(names) == 1 else 'need'} {words}"]
    return Judged(layers, steps, batches, tuple(rule.name for rule in could), tuple(missed), nothing)


def _needs(rule: Rule) -> list[str]:
    """In the order of `_WORDS`."""
    needs = {rule.needs if source == "layer" else source for source in rule.sources}
    return [need for need in _WORDS if need in needs]
