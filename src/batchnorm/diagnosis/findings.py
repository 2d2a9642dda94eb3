"""Findings: the list of what is wrong, worst first. Printed, it is a report."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .finding import SEVERITIES, Finding
from .terminal import to_text


class Findings(list[Finding]):
    """A list of findings, worst first; of one rule and layer, the worst alone. Printed, it is a table."""

    def __init__(self, findings: Iterable[Finding] = ()) -> None:
        kept: dict[tuple[str, str | None], Finding] = {}
        for finding in sorted(findings, key=_badness):
            kept.setdefault((finding.rule, finding.layer), finding)
        super().__init__(kept.values())

    @property
    def serious(self) -> list[Finding]:
        """Those that are serious."""
        return [finding for finding in self if finding.severity == "serious"]

    def to_dict(self) -> dict[str, Any]:
        """Count of each severity, and every finding, in JSON's own types."""
        counts = {severity: sum(finding.severity == severity for finding in self) for severity in SEVERITIES}
        return {**counts, "findings": [finding.to_dict() for finding in self]}

    def __str__(self) -> str:
        return to_text(self)


def _badness(finding: Finding) -> tuple[int, float]:
    return SEVERITIES.index(finding.severity), -finding.confidence
