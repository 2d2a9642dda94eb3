"""`batchnorm tail`: a run in the terminal while it is written. A table that renews itself; in a pipe, plain lines."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

from ..runs.tail import Tail
from .facts import NONFINITE, PERCENTILES, plural, progress, some
from .terminal import LEARNED, MEASURED, MUTED, text

if TYPE_CHECKING:
    from ..runs.reader import Run

Find = Callable[["Run"], list[tuple[str, tuple[str, ...], str]]]  # the fault, the layers that have it, the evidence

LOOK_SECONDS = 0.5
LINE_SECONDS = 5.0  # from one plain line to the next, at least
FIND_SECONDS = 10.0  # from one search for faults to the next, at least
BUSY_SHARE = 0.05  # of a processor, that searching for them may take
RECENT = 100  # records in which a value that is not there in the last one may be
MEDIAN = PERCENTILES["p50"]
COLUMNS = ("layer", "measured mean", "measured std", "tracked mean", "tracked std", "learned γ", "learned β")
STYLES = ("", MEASURED, MEASURED, MUTED, MUTED, LEARNED, LEARNED)
QUANTITIES = ("batch_mean", "batch_var", "running_mean", "running_var", "gamma", "beta")


def follow(
    path: Path,
    find: Find,
    stays: bool = False,
    console: Console | None = None,
    sleep: Callable[[float], object] = time.sleep,
) -> None:
    """Print a run while it is written, until it has ended.

    Args:
        path: its folder; it need not be there yet.
        find: says what is wrong with a run; asked now and then.
        stays: go on when the run has ended.
        console: where to.
        sleep: waits.
    Raises:
        ValueError: what is there is no run.
    """
    console = console or Console(highlight=False, soft_wrap=True)
    watch = _Watch(path, find)
    if console.is_terminal:
        with Live(console=console, refresh_per_second=4, transient=False) as live:
            for run, said in watch.looks(stays, sleep):
                for line in said:
                    live.console.print(line)
                live.update(_table(run, console.size.height - 4))
        return
    printed = -LINE_SECONDS
    run = None
    for run, said in watch.looks(stays, sleep):
        now = time.monotonic()
        if said or now - printed >= LINE_SECONDS:
            printed = now
            for line in (*said, text(_summary(run))):
                console.print(line)
    if run is not None:
        console.print(text(_summary(run)))
        for name, *values in _rows(run.main):
            about = (f"{column} {value}" for column, value in zip(COLUMNS[1:], values, strict=True))
            console.print(text(f"{name}: {', '.join(about)}"))


class _Watch:
    """What is new in a run, look after look."""

    def __init__(self, path: Path, find: Find) -> None:
        self._tail, self._find = Tail(path), find
        self._alerts = 0
        self._seen: set[tuple[str, str]] = set()  # fault and layer, found by the last search
        self._said: set[tuple[str, str]] = set()
        self._next_find = time.monotonic() + FIND_SECONDS

    def looks(self, stays: bool, sleep: Callable[[float], object]) -> Iterator[tuple[Run, list[Any]]]:
        """The run each time that it has changed, and what there is to say of it."""
        before: object = None
        while True:
            stamp = self._tail.stamp()
            run = self._tail.refresh()
            if run is not None:
                has_ended = run.status != "running"
                if stamp != before:
                    before = stamp
                    yield run, self._news(run.main, has_ended)
                if has_ended and not stays:
                    return
            sleep(LOOK_SECONDS)

    def _news(self, run: Run, has_ended: bool) -> list[Any]:
        alerts = run.alerts()
        if len(alerts) < self._alerts:  # a recorder went back
            self._alerts = 0
        said = [text(_alert(row), "bold red") for row in alerts[self._alerts :]]
        self._alerts = len(alerts)
        if has_ended or time.monotonic() >= self._next_find:
            said += self._search(run, has_ended)
        return said

    def _search(self, run: Run, has_ended: bool) -> list[Any]:
        """What is found wrong for the second time in a row, or at the end: some faults pass by themselves."""
        begin = time.thread_time()
        said, seen = [], set()
        for fault, layers, evidence in self._find(run):
            here = {(fault, layer) for layer in layers or ("the model",)}
            seen |= here
            if (here if has_ended else here & self._seen) - self._said:
                self._said |= here
                said.append(text(f"{fault} in {some(layers) or 'the model'}: {evidence}", "bold"))
        self._seen = seen
        spent = time.thread_time() - begin
        self._next_find = time.monotonic() + max(FIND_SECONDS, spent / BUSY_SHARE)
        return said


def _alert(row: dict[str, Any]) -> str:
    what = "NaN or infinite" if row.get("what") == "nonfinite" else str(row.get("what"))
    count = f" in {row['count']} channels" if isinstance(row.get("count"), int) else ""
    return f"step {row['step']:,}: {row.get('quantity')} of {row.get('layer')} {what}{count}"


def _summary(run: Run) -> str:
    """One line: how far the training is, and what it logged last."""
    logged = run.main.scalars()[-1:]
    numbers = [f"{name} {_number(value)}" for row in logged for name, value in row.items() if name != "step"]
    return " ".join([progress(run), *(["Logged: " + ", ".join(numbers)] if numbers else [])])


def _rows(run: Run, most: int | None = None) -> Iterator[tuple[str, ...]]:
    """The cells of each layer: medians over its channels, at the last recorded step that has them."""
    for layer in run.layers[:most]:
        values = (_last(run, layer.name, quantity) for quantity in QUANTITIES)
        yield layer.name or "(the model itself)", *map(_number, values)


def _last(run: Run, layer: str, quantity: str) -> float | None:
    """The median over the channels, of a variance its root: NaN where one was not finite, None where there is none."""
    recent = run.stats(layer, quantity)[-RECENT:]
    there = recent[~np.isnan(recent[:, NONFINITE])][-1:]
    if not len(there):
        return None
    median = math.nan if there[0, NONFINITE] else float(there[0, MEDIAN])
    return float(np.sqrt(median)) if quantity.endswith("_var") else median


def _table(run: Run, height: int) -> Group:
    main, most = run.main, max(1, height)
    table = Table(box=None, pad_edge=False, header_style=MUTED)
    for column, style in zip(COLUMNS, STYLES, strict=True):
        table.add_column(column, style=style, justify="left" if column == "layer" else "right")
    for row in _rows(main, most):
        table.add_row(*map(text, row))
    more = len(main.layers) - most
    note = f"and {plural(more, 'more layer')}; " if more > 0 else ""
    return Group(text(_summary(run)), table, text(f"{note}medians over the channels", MUTED))


def _number(value: Any) -> str:
    if value is None:
        return "–"
    return (format(value, ".4g") if isinstance(value, float) else str(value)).replace("-", "−")
