"""Findings in a notebook: a table, a row a finding."""

from __future__ import annotations

from collections.abc import Sequence

from ..table import to_html
from .finding import Finding
from .terminal import counted, told

COLUMNS = ("severity", "rule", "where", "evidence", "what to do")


def findings_html(findings: Sequence[Finding], judged: Sequence[str] = ()) -> str:
    """Return the findings as a table, and below it the lines that say what was judged."""
    table = to_html(counted(findings), COLUMNS if findings else (), map(told, findings))
    return table + "".join(to_html(line, (), ()) for line in judged)
