"""What benchmarks share: steps timed in turns, the line that says where it ran, and the file it writes."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

from batchnorm.bench.timing import by_clock, interleave, machine

RESULTS = Path(__file__).parent / "results"


def header(title: str, notes: str) -> list[str]:
    """Title, and a paragraph with the command, the date, the machine and the versions."""
    where = machine()
    command = " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    return [
        f"# {title}",
        "",
        "`{command}`, {today}: {processor}, {cores} cores ({capability}), torch {torch}, Python {python}, "
        "{threads} thread(s).".format(command=command, today=date.today(), **where),
        notes,
        "",
    ]


def ratios(
    steps: dict[str, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """The time of each step beside that of the one called "plain": medians of the ratios within each round."""
    seconds = interleave(steps, (rounds, rounds), timed=by_clock(clock))
    pairs = {name: zip(values, seconds["plain"], strict=True) for name, values in seconds.items()}
    return {name: statistics.median(a / b for a, b in values) for name, values in pairs.items()}


def save(name: str, lines: list[str]) -> None:
    """Write the lines to benchmarks/results/<name>.md."""
    write(RESULTS / f"{name}.md", "\n".join(lines) + "\n")


def write(path: Path, text: str) -> None:
    """Write the file whole or not at all: a killed program leaves the old file."""
    new = path.with_name(f"{path.name}.new")
    new.write_text(text)
    new.replace(path)
