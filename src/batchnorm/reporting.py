"""report(): the page of a run, with what `diagnose` finds in it. Nothing here imports torch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from .runs.reader import Run, open_run

if TYPE_CHECKING:
    from .view.judgement import Judgement


def report(run_or_path: Run | str | os.PathLike[str], out: str | os.PathLike[str] | None = None) -> Path:
    """Write the page of a run and return where it is.

    Args:
        run_or_path: a run from `open_run`, or the folder of one.
        out: the file to write; RUN/report.html if not given. It appears whole or not at all.
    Returns:
        The path of the page: one HTML file that opens offline. It shows what `diagnose` finds in the run.
    Raises:
        FileNotFoundError: there is no such folder, or it holds no run.
        ValueError: the run cannot be read.
        IsADirectoryError: `out` is a folder.
        PermissionError: the page must not be written there.
        ModuleNotFoundError: Altair or vl-convert is not installed (`pip install "batchnorm[report]"`).
    """
    from .view.page import report as write_page
    from .view.page import require_charts

    require_charts()
    run = run_or_path if isinstance(run_or_path, Run) else open_run(run_or_path)
    return write_page(run, out, judge(run))


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
