"""Finding: one thing that is wrong, with its evidence and its remedy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from ..view.facts import plain

Severity = Literal["serious", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("serious", "warning", "note")


@dataclass(frozen=True)
class Finding:
    """One thing that a rule found wrong.

    Attributes:
        rule: its name, as in the table of docs/diagnose.md.
        layer: the layer's name in the model; None for the model, or the training, as a whole.
        severity: "serious" (what the model computes is wrong or will be), "warning" (likely harm), "note" (waste, or
            harm under circumstances that cannot be seen).
        evidence: a sentence with the numbers that were found.
        since_step: the step of a run at which it began; None where there is no run, or nobody can tell.
        remedy: the call to make, Python.
        confidence: from 0 to 1: how sure it is that this is the fault, and not something that looks like it.
        numbers: those of the evidence, by name.
    """

    rule: str
    layer: str | None
    severity: Severity
    evidence: str
    since_step: int | None
    remedy: str
    confidence: float
    numbers: Mapping[str, float] = field(default_factory=dict, hash=False)

    def to_dict(self) -> dict[str, Any]:
        """All of it in JSON's own types; a number that is not finite becomes None."""
        return plain(asdict(self))
