"""report(): the page of a run, with what `diagnose` finds in it. Nothing here imports torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Union

from .runs.reader import Run, open_run

if TYPE_CHECKING:
    from .view.judgement import Judgement


RunOrPath = Union["Run", str, "os.PathLike[str]"]


def report(run_or_path: RunOrPath | Sequence[RunOrPath], out: str | os.PathLike[str] | None = None) -> Path:
    """Write the page of a run, or of several side by side, and return where it is.

    Args:
        run_or_path: a run from `open_run`, or the folder of one; or a list of up to 6 of them.
        out: the file to write. If not given: RUN/report.html; of several runs side-by-side.html in the folder that the
            first one is in. It appears whole or not at all.
    Returns:
        The path of the page: one HTML file that opens offline. That of one run shows what `diagnose` finds in it.
    Raises:
        FileNotFoundError: there is no such folder, or it holds no run.
        ValueError: a run cannot be read; no runs, or too many.
        IsADirectoryError: `out` is a folder.
        PermissionError: the page must not be written there.
        ModuleNotFoundError: Altair or vl-convert is not installed (`pip install "batchnorm[report]"`).
    """
    from .view import page, side_by_side

    page.require_charts()
    given = [run_or_path] if isinstance(run_or_path, (Run, str, os.PathLike)) else run_or_path
    runs = [each if isinstance(each, Run) else open_run(each) for each in given]
    if len(runs) == 1:
        return page.report(runs[0], out, judge(runs[0]))
    return side_by_side.report(runs, out)


def judge(run: Run) -> Judgement:
    """Return what `diagnose` finds in a run, in the words that the page shows."""
    from .diagnosis.judge import diagnose
    from .diagnosis.terminal import since, where
    from .view.judgement import Found, Judgement

    findings = diagnose(run)
    found = [
        Found(
            finding.severity,
            finding.rule,
            finding.evidence,
            finding.remedy,
            where(finding),
            finding.layers,
            since(finding),
            finding.since_step,
            tuple((each.layer or "", each.evidence) for each in finding.each),
        )
        for finding in findings
    ]
    return Judgement(found, findings.judged.lines(), findings.judged.nothing)
