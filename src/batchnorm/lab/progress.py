"""Progress on stderr: a live bar on a terminal, a plain line now and then elsewhere. Stdout is left to the results."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, TaskID
from rich.progress import Progress as Bar

if TYPE_CHECKING:
    from .training import Tick

PLAIN_SECONDS = 2.0
WIDE_ENOUGH = 100  # columns: a bar beside the line


class Progress:
    """Shows where the training of several arms stands: called with every step, used as a context manager.

    Args:
        arms: their names, in the order in which they run.
    """

    def __init__(self, arms: tuple[str, ...]) -> None:
        self._arms = arms
        console = Console(stderr=True)
        bar = (BarColumn(20),) if console.width >= WIDE_ENOUGH else ()
        self._bar = Bar(*bar, "{task.description}", console=console, transient=True)
        self._room = console.width - 21 * len(bar)
        self._is_live = console.is_terminal
        self._task: TaskID | None = None
        self._began = self._printed = 0.0
        self._first = 0

    def __enter__(self) -> Progress:
        if self._is_live:
            self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._is_live:
            self._bar.stop()

    def __call__(self, tick: Tick) -> None:
        """Show a step that was just taken."""
        now = time.monotonic()
        number = self._arms.index(tick.arm)
        done, total = number * tick.steps + tick.step, len(self._arms) * tick.steps
        if self._task is None:
            self._task = self._bar.add_task("", total=total)
            self._began, self._first = now, done
        if self._is_live:
            self._bar.update(self._task, completed=done, description=self._line(tick, number, done, total, now))
        elif now - self._printed >= PLAIN_SECONDS or tick.step == tick.steps:
            self._printed = now
            print(self._line(tick, number, done, total, now), file=sys.stderr, flush=True)

    def _line(self, tick: Tick, number: int, done: int, total: int, now: float) -> str:
        steps = done - self._first
        left = timedelta(seconds=round((now - self._began) / steps * (total - done))) if steps else "?"
        accuracy = [] if tick.accuracy is None else [f"accuracy {100 * tick.accuracy:.1f} %"]
        first, *others = (
            f"{tick.arm} ({number + 1}/{len(self._arms)}): epoch {tick.epoch}/{tick.epochs}",
            f"step {tick.step}/{tick.steps}",
            f"loss {tick.loss:.4f}",
            *accuracy,
            f"{left} left",
        )
        # A live line that is too long would be cut: what matters least is left out, from the middle.
        while self._is_live and others and len(", ".join([first, *others])) > self._room:
            others.pop(0)
        return ", ".join([first, *others])
