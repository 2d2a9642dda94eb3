"""Findings in the terminal: what was found, where, on what evidence, what to do, and what was judged."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console

from ..view.facts import plural, some
from ..view.terminal import MUTED, console, say, text
from .finding import SEVERITIES, Finding

if TYPE_CHECKING:
    from .findings import Findings

STYLES = {"serious": "bold red", "warning": "yellow", "note": ""}
COLUMNS = 110


def show(findings: Findings, to: Console | None = None, wraps_code: bool = True) -> None:
    """Print them, and what was judged; `wraps_code`: a comment that is too long goes on in lines below its code."""
    to = to or console()
    say(to, text(counted(findings), "bold"))
    for finding in findings:
        rule = text(f"{finding.severity}: {finding.rule}", STYLES[finding.severity])
        say(to, rule + text(", ".join(filter(None, [f" in {where(finding)}", since(finding)]))))
        say(to, text(finding.evidence), "  ")
        first, *more = finding.remedy.splitlines()
        for line, indent in ((first, "  → "), *((line, "    ") for line in more)):
            if wraps_code:
                _code(to, line, indent)
            else:
                to.print(text(indent + line, MUTED), soft_wrap=True)
    for line in findings.judged.lines():
        say(to, text(line, MUTED))


def _code(to: Console, line: str, indent: str) -> None:
    """Print a line of Python, to be copied: it stays one line, but for its comment, which may go on in lines below."""
    code, mark, comment = ("", "# ", line[2:]) if line.startswith("# ") else line.rpartition("  # ")
    if not mark or "'" in comment or '"' in comment or len(indent + line) <= to.width:  # a name may hold that too
        to.print(text(indent + line, MUTED), soft_wrap=True)
        return
    if code:
        to.print(text(indent + code, MUTED), soft_wrap=True)
        indent = " " * len(indent)
    say(to, text(comment, MUTED), f"{indent}# ", "    # ")


def to_text(findings: Findings) -> str:
    """The same as plain text."""
    to = Console(file=io.StringIO(), width=COLUMNS, color_system=None)
    show(findings, to, wraps_code=False)
    return "\n".join(line.rstrip() for line in to.file.getvalue().splitlines())  # pyright: ignore[reportAttributeAccessIssue]


def counted(findings: Sequence[Finding]) -> str:
    """How many there are of each severity."""
    counts = [(severity, sum(finding.severity == severity for finding in findings)) for severity in SEVERITIES]
    said = ", ".join(f"{count} {severity}" for severity, count in counts if count)
    return f"{plural(len(findings), 'finding')}{': ' + said if said else '.'}"


def told(finding: Finding) -> tuple[str, str, str, str, str]:
    """What a table has of it: severity, rule, place, evidence, remedy."""
    place = ", ".join(filter(None, [where(finding), since(finding)]))
    return finding.severity, finding.rule, place, finding.evidence, finding.remedy


def where(finding: Finding) -> str:
    """The layers, and the sources where there are several."""
    layers = some(finding.layers) or "the model"
    return f"{layers} of {some(finding.sources)}" if finding.sources else layers


def since(finding: Finding) -> str:
    """The step at which it began, or those of its layers; nothing where nobody can tell."""
    steps = [each.since_step for each in finding.each or (finding,) if each.since_step is not None]
    if not steps:
        return ""
    first, last = min(steps), max(steps)
    return f"since step {first:,}" if first == last else f"since steps {first:,} to {last:,}"
