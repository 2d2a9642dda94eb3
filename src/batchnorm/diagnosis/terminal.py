"""Findings in the terminal: what was found, where, on what evidence, and what to do."""

from __future__ import annotations

import io
from collections.abc import Sequence
from itertools import groupby

from rich.console import Console, Group
from rich.padding import Padding

from ..view.facts import plural
from ..view.terminal import MUTED, text
from .finding import SEVERITIES, Finding

STYLES = {"serious": "bold red", "warning": "yellow", "note": ""}
NAMED = 4  # layers that share a finding and are named
COLUMNS = 110


def show(findings: Sequence[Finding], console: Console | None = None) -> None:
    """Print them, those of one rule and severity together, with the evidence of the first."""
    console = console or Console()
    counts = [(severity, sum(finding.severity == severity for finding in findings)) for severity in SEVERITIES]
    said = ", ".join(f"{count} {severity}" for severity, count in counts if count)
    console.print(text(f"{plural(len(findings), 'finding')}{': ' + said if said else '.'}", "bold"))
    for (severity, rule), alike in groupby(_by_rule(findings), key=lambda finding: (finding.severity, finding.rule)):
        first, *others = alike
        where = first.layer or "the model"
        if others:
            names = [finding.layer or "the model" for finding in others[: NAMED - 1]]
            more = len(others) - len(names)
            where += ", " + ", ".join(names) + (f" and {more} more" if more else "")
        since = f", since step {first.since_step:,}" if first.since_step is not None else ""
        evidence = first.evidence + (f" ({first.layer})" if others else "")
        console.print(text(f"{severity}: {rule}", STYLES[severity]), text(f"in {where}{since}"), soft_wrap=True)
        console.print(Padding(Group(text(evidence)), (0, 0, 0, 2)))
        console.print(text(f"  → {first.remedy}", MUTED), soft_wrap=True)


def to_text(findings: Sequence[Finding]) -> str:
    """The same as plain text."""
    console = Console(file=io.StringIO(), width=COLUMNS, color_system=None)
    show(findings, console)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())  # pyright: ignore[reportAttributeAccessIssue]


def _by_rule(findings: Sequence[Finding]) -> list[Finding]:
    rules = list(dict.fromkeys(finding.rule for finding in findings))
    return sorted(findings, key=lambda finding: (SEVERITIES.index(finding.severity), rules.index(finding.rule)))
