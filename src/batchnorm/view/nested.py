"""Experiments whose folders lie within a run's: `batchnorm train` puts a second one there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import quote

from ..runs.reader import open_run
from ..runs.schema import RUN
from .facts import GAMMA_BETA
from .words import summarize

if TYPE_CHECKING:
    from ..runs.reader import Run

PAGE = "report.html"


@dataclass(frozen=True)
class Nested:
    """An experiment within a run's folder.

    Attributes:
        name: its own.
        learns: whether gamma and beta are all that learns in it.
        words: what it shows, in sentences.
        page: where its page is, relative to that of the run.
    """

    name: str
    learns: bool
    words: list[str]
    page: str


def nested(run: Run) -> list[Nested]:
    """Return the experiments in folders within the run's that are no arms of it; unreadable ones are left out."""
    found = []
    folders = sorted(path.parent for path in run.path.glob(f"*/{RUN}")) if run.arms else []
    for path in folders:
        if path.name in run.arms:
            continue
        try:
            other = open_run(path)
        except (OSError, ValueError):
            continue
        if other.meta.get("experiment") and other.arms:
            learns = other.meta.get("learns") == GAMMA_BETA
            found.append(Nested(path.name, learns, summarize(other).plain[2:], f"{quote(path.name)}/{PAGE}"))
    return found
