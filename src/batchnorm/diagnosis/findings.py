"""Findings: the list of what is wrong, worst first. Printed, and in a notebook, it is a report."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Any

from .finding import SEVERITIES, Finding, joined
from .judged import Judged
from .notebook import findings_html
from .terminal import to_text

MANY = 4  # layers or sources that share a finding; fewer have one each


class Findings(list[Finding]):
    """A list of findings, worst first. Printed, and in a notebook, it is a report.

    Of one rule and layer the worst is kept; four layers and more that share rule, severity and remedy share a finding.

    Attributes:
        judged: how much was judged, by which rules, and what could not be judged and why.
    """

    def __init__(self, findings: Iterable[Finding] = (), judged: Judged | None = None) -> None:
        numbered = list(enumerate(findings))
        kept: dict[Any, tuple[int, Finding]] = {}
        for i, finding in sorted(numbered, key=lambda each: _badness(each[1])):
            kept.setdefault((finding.rule, finding.layer, finding.sources), (i, finding))
        groups: dict[Any, list[Finding]] = {}
        for _, finding in sorted(kept.values(), key=lambda each: each[0]):  # in model order
            cure = finding.cure.code if finding.cure else finding.remedy
            groups.setdefault((finding.rule, finding.severity, cure), []).append(finding)
        shared = [[joined(group)] if len(group) >= MANY else group for group in groups.values()]
        super().__init__(sorted(chain.from_iterable(shared), key=_badness))
        self.judged = judged or Judged()

    @property
    def serious(self) -> list[Finding]:
        """Those that are serious."""
        return [finding for finding in self if finding.severity == "serious"]

    def to_dict(self) -> dict[str, Any]:
        """Count of each severity, every finding, and what was judged, in JSON's own types."""
        counts = {severity: sum(finding.severity == severity for finding in self) for severity in SEVERITIES}
        found = [finding.to_dict() for finding in self]
        return {**counts, "findings": found, "judged": self.judged.to_dict()}

    def __str__(self) -> str:
        return to_text(self)

    def _repr_html_(self) -> str:
        return findings_html(self, self.judged.lines())


def _badness(finding: Finding) -> tuple[int, float]:
    return SEVERITIES.index(finding.severity), -finding.confidence
