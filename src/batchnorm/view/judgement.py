"""What a diagnosis found in a run, in plain words, as the page shows it: view/ knows no rule."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from . import facts
from .facts import plural

if TYPE_CHECKING:
    from ..runs.reader import Run


@dataclass(frozen=True)
class Found:
    """One finding.

    Attributes:
        severity: "serious", "warning" or "note".
        rule: the name of the rule.
        evidence: a sentence with its numbers; of several layers, those of the worst.
        remedy: Python.
        where: its layers, in words.
        layers: their names; none where it is of the training as a whole.
        since: in words, when it began; "" where nobody can tell.
        step: the first step at which it was so; None where nobody can tell.
        each: name and evidence of each layer, where there are several.
    """

    severity: str
    rule: str
    evidence: str
    remedy: str
    where: str
    layers: tuple[str, ...] = ()
    since: str = ""
    step: int | None = None
    each: tuple[tuple[str, str], ...] = ()

    @property
    def matters(self) -> bool:
        """Whether it is more than a note: harm is likely."""
        return self.severity != "note"


@dataclass(frozen=True)
class Judgement:
    """All that was found, worst first, and lines that say what was judged and what was not."""

    found: list[Found] = field(default_factory=list)
    judged: list[str] = field(default_factory=list)
    nothing: bool = False  # the run held nothing to judge

    @property
    def matters(self) -> list[Found]:
        """Those that are more than notes."""
        return [found for found in self.found if found.matters]


def health(run: Run, judgement: Judgement | None) -> str:
    """Return one line: how many layers are fine and how many to look at; unjudged, whether all that was recorded was
    finite.
    """
    if judgement is None or judgement.nothing:
        return facts.health(run)
    count = len(run.main.layers)
    ill = len({layer for found in judgement.matters for layer in found.layers})
    notes = len(judgement.found) - len(judgement.matters)
    whole = sum(not found.layers for found in judgement.matters)
    told = f"{count - ill} fine, {ill} to look at" if ill else "all fine" if count > 1 else "fine"
    told += f", {plural(whole, 'finding')} on the whole training" if whole else ""
    return f"{plural(count, 'BN layer')}: {told}" + (f"; {plural(notes, 'note')}" if notes else "")
