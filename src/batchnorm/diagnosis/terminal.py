"""Findings in the terminal: what was found, where, on what evidence, what to do, and what was judged."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.padding import Padding

from ..view.facts import plural, some
from ..view.terminal import MUTED, text
from .finding import SEVERITIES, Finding

if TYPE_CHECKING:
    from .findings import Findings

STYLES = {"serious": "bold red", "warning": "yellow", "note": ""}
COLUMNS = 110


def show(findings: Findings, console: Console | None = None) -> None:
    """Print them, and what was judged."""
    console = console or Console()
    console.print(text(counted(findings), "bold"))
    for finding in findings:
        console.print(
            text(f"{finding.severity}: {finding.rule}", STYLES[finding.severity]),
            text(f"in {where(finding)}{since(finding)}"),
            soft_wrap=True,
        )
        console.print(Padding(Group(text(finding.evidence)), (0, 0, 0, 2)))
        first, *more = finding.remedy.splitlines()
        for line in (f"  → {first}", *(f"    {line}" for line in more)):
            console.print(text(line, MUTED), soft_wrap=True)
    for line in findings.judged.lines():
        console.print(text(line, MUTED), soft_wrap=True)


def to_text(findings: Findings) -> str:
    """The same as plain text."""
    console = Console(file=io.StringIO(), width=COLUMNS, color_system=None)
    show(findings, console)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())  # pyright: ignore[reportAttributeAccessIssue]


def counted(findings: Sequence[Finding]) -> str:
    """How many there are of each severity."""
    counts = [(severity, sum(finding.severity == severity for finding in findings)) for severity in SEVERITIES]
    said = ", ".join(f"{count} {severity}" for severity, count in counts if count)
    return f"{plural(len(findings), 'finding')}{': ' + said if said else '.'}"


def told(finding: Finding) -> tuple[str, str, str, str, str]:
    """What a table has of it: severity, rule, place, evidence, remedy."""
    place = f"{where(finding)}{since(finding)}"
    return finding.severity, finding.rule, place, finding.evidence, finding.remedy


def where(finding: Finding) -> str:
    """The layers, and of several sources which."""
    where = some(finding.layers) or "the model"
    return f"{where} of {some(finding.sources)}" if finding.sources else where


def since(finding: Finding) -> str:
    """The steps at which it began, after a comma; nothing where nobody can tell."""
    steps = [each.since_step for each in finding.each or (finding,) if each.since_step is not None]
    if not steps:
        return ""
    first, last = min(steps), max(steps)
    return f", since step {first:,}" if first == last else f", since steps {first:,} to {last:,}"
