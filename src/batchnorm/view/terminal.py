"""Runs in the terminal, in rich tables: `list_` the runs of a folder, `show` one."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from .facts import brief, extent, facts, plural, spoken

if TYPE_CHECKING:
    from ..runs.reader import Run

MOST_LAYERS = 1_000
WIDE = 100_000  # columns: more than any table needs
ARM_COLUMNS = ("arm", "status", "test accuracy", "train accuracy", "steps", "seconds")
LAYER_COLUMNS = ("layer", "channels", "γ, learned", "β, learned", "batch mean, measured")
READING = (
    "median over the channels, first recorded step → last; in brackets the middle 90 %; NaN where any channel was not "
    "finite"
)
MEASURED, LEARNED, MUTED = "bright_blue", "dark_orange", "bright_black"


def console(stderr: bool = False) -> Console:
    """A console as wide as the terminal, or as COLUMNS says; where there is neither, in a pipe or a file, a line is
    never wrapped, so that a sentence is a line.
    """
    found = Console(stderr=stderr)
    if not found.file.isatty() and "COLUMNS" not in os.environ:  # FORCE_COLOR makes no terminal
        found.width = WIDE
    return found


def say(console: Console, content: Text | str, indent: str = "", then: str | None = None) -> None:
    """Print a text, wrapped between words; a word that is longer than the line, a path, stays whole.

    Args:
        indent: stands before the first line.
        then: stands before the others; None for as many spaces.
    """
    content = text(content) if isinstance(content, str) else content
    then = " " * len(indent) if then is None else then
    for line in content.divide(_line_starts(content.plain, console.width - len(indent))):
        line.rstrip()
        console.print(Text(indent) + line, soft_wrap=True)
        indent = then


def _line_starts(content: str, width: int) -> list[int]:
    """Where lines after the first one begin; rich's own wrapping cuts a long word, or wraps nothing."""
    starts, used = [], 0
    for word in re.finditer(r"\S+(?: %\S*)?\s*", content):  # 9.5 % is one word
        if used and used + cell_len(word[0].rstrip()) > width:
            starts.append(word.start())
            used = 0
        used += cell_len(word[0])
    return starts


@dataclass(frozen=True)
class Column:
    """A column of `rows`."""

    name: str
    right: bool = False
    style: str = ""


def rows(console: Console, columns: Sequence[Column], cells: Iterable[Sequence[str]]) -> None:
    """Print a table; where it is wider than the console each row is a card, the first cell and below it the others."""
    cells = [tuple(row) for row in cells]
    table = Table(box=None, pad_edge=False, header_style=MUTED)
    for column in columns:
        table.add_column(column.name, justify="right" if column.right else "left", style=column.style, no_wrap=True)
    for row in cells:
        table.add_row(*map(text, row))
    if Measurement.get(console, console.options.update(width=WIDE), table).maximum <= console.width:
        console.print(table)
        return
    for first, *others in cells:
        say(console, first, then="  ")
        for column, cell in zip(columns[1:], others, strict=True):
            if cell:
                said = text(f"{column.name}: ", MUTED) + text(cell, column.style)
                say(console, said, "  ", "    ")


def list_(runs: Sequence[Run], root: Path, to: Console | None = None) -> None:
    """Print a line a run."""
    to = to or console()
    if not runs:
        say(to, f"No runs in {root}.")
        return
    cells = []
    for run in runs:
        said = brief(run)
        accuracies = ", ".join(f"{arm} {value:.1%}" for arm, value in said["test_accuracy"].items())
        path, steps = os.path.relpath(run.path), f"{said['steps']:,}"
        cells.append((path, said["created"][:19], said["status"], steps, str(said["layers"]), accuracies))
    columns = ("run", "begun (UTC)", "status", "steps", "layers", "test accuracy")
    rows(to, [Column(name, right=name in ("steps", "layers")) for name in columns], cells)


def show(run: Run, to: Console | None = None) -> None:
    """Print what a run recorded: how it went, its layers, γ and β then and now, what was not finite."""
    to = to or console()
    said = facts(run, MOST_LAYERS)
    say(to, Text(" ").join([text(run.path.name, "bold"), text(said["status"]), text(said["created"], MUTED)]))
    if said["meta"]:
        say(to, text("; ".join(f"{name} {spoken(value)}" for name, value in said["meta"].items()), MUTED))
    say(to, f"{extent(run)}; {said['health']}")
    for line in (*said["alerts"], *(f"damage: {line}" for line in said["damage"])):
        say(to, text(line, "bold red"), "  ")
    if said["arms"]:
        rows(to, _ARMS, map(arm_cells, said["arms"], said["arms"].values()))
    if said["layers"]:
        rows(to, _LAYERS, map(layer_cells, said["layers"]))
        more = len(run.main.layers) - len(said["layers"])
        if more:
            say(to, f"and {plural(more, 'more layer')}: --json names all")
        say(to, text(READING, MUTED))


_ARMS = [Column(name) for name in ARM_COLUMNS]
_LAYERS = [
    Column(LAYER_COLUMNS[0]),
    Column(LAYER_COLUMNS[1], right=True),
    *(Column(name, style=LEARNED) for name in LAYER_COLUMNS[2:4]),
    Column(LAYER_COLUMNS[4], style=MEASURED),
]


def arm_cells(name: str, arm: dict[str, Any]) -> tuple[str, ...]:
    """Return an arm's row of the table of arms."""
    accuracies = (_number(arm.get(f"{split}_accuracy"), ".2%") for split in ("test", "train"))
    return name, arm["status"], *accuracies, _number(arm.get("steps"), ","), _number(arm.get("seconds"), ".1f")


def layer_cells(layer: dict[str, Any]) -> tuple[str, ...]:
    """Return a layer's row of the table of layers."""
    learned = [_story(layer[q]) if layer["affine"] else "none: affine=False" for q in ("gamma", "beta")]
    return layer["name"] or "(the model itself)", str(layer["channels"]), *learned, _story(layer["batch_mean"])


def _story(ends: dict[str, dict[str, float | None]] | None) -> str:
    if ends is None:
        return "–"
    first, last = ends["first"], ends["last"]
    told = f"{_median(first)} → {_median(last)}"
    if None not in last.values():
        told += f" [{last['p05']:.3g}, {last['p95']:.3g}]"
    return told.replace("-", "−")


def _median(step: dict[str, float | None]) -> str:
    return "NaN" if step["p50"] is None else f"{step['p50']:.3g}"


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def text(content: str, style: str = "") -> Text:
    """Return text as it is: no markup is read in it, and what would steer the terminal is replaced."""
    return Text("".join(each if each.isprintable() else "�" for each in content), style=style)
