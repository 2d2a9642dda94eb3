"""Runs in the terminal, in rich tables: `list_` the runs of a folder, `show` one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
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


def list_(runs: Sequence[Run], root: Path, console: Console | None = None) -> None:
    """Print a line a run."""
    console = console or Console()
    if not runs:
        console.print(text(f"No runs in {root}."))
        return
    table = Table(box=None, pad_edge=False, header_style=MUTED)
    for column in ("run", "begun (UTC)", "status", "steps", "layers", "test accuracy"):
        table.add_column(
            column,
            justify="right" if column in ("steps", "layers") else "left",
            overflow="fold",
            no_wrap=column == "run",  # it is copied, and piped, to `show`
        )
    for run in runs:
        said = brief(run)
        accuracies = ", ".join(f"{arm} {value:.1%}" for arm, value in said["test_accuracy"].items())
        path, steps = os.path.relpath(run.path), f"{said['steps']:,}"
        cells = (path, said["created"][:19], said["status"], steps, str(said["layers"]))
        table.add_row(*map(text, (*cells, accuracies)))
    # A path that is cut opens no run: a narrow or piped table is rather printed wider than the terminal.
    console.width = WIDE
    console.print(table)


def show(run: Run, console: Console | None = None) -> None:
    """Print what a run recorded: how it went, its layers, γ and β then and now, what was not finite."""
    console = console or Console()
    said = facts(run, MOST_LAYERS)
    console.print(text(run.path.name, "bold"), text(said["status"]), text(said["created"], MUTED))
    if said["meta"]:
        console.print(text("; ".join(f"{name} {spoken(value)}" for name, value in said["meta"].items()), MUTED))
    console.print(text(f"{extent(run)}; {said['health']}"))
    for line in (*said["alerts"], *(f"damage: {line}" for line in said["damage"])):
        console.print(text(f"  {line}", "bold red"))
    if said["arms"]:
        console.print(_arms(said["arms"]))
    if said["layers"]:
        console.print(_layers(said["layers"]))
        more = len(run.main.layers) - len(said["layers"])
        if more:
            console.print(text(f"and {plural(more, 'more layer')}: --json names all"))
        console.print(text(READING, MUTED))


def _arms(arms: dict[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False, header_style=MUTED, title_justify="left")
    for column in ARM_COLUMNS:
        table.add_column(column)
    for name, arm in arms.items():
        table.add_row(*map(text, arm_cells(name, arm)))
    return table


def arm_cells(name: str, arm: dict[str, Any]) -> tuple[str, ...]:
    """Return an arm's row of the table of arms."""
    accuracies = (_number(arm.get(f"{split}_accuracy"), ".2%") for split in ("test", "train"))
    return name, arm["status"], *accuracies, _number(arm.get("steps"), ","), _number(arm.get("seconds"), ".1f")


def _layers(layers: list[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style=MUTED)
    name, channels, gamma, beta, measured = LAYER_COLUMNS
    table.add_column(name, overflow="fold")
    table.add_column(channels, justify="right")
    table.add_column(gamma, style=LEARNED)
    table.add_column(beta, style=LEARNED)
    table.add_column(measured, style=MEASURED)
    for layer in layers:
        table.add_row(*map(text, layer_cells(layer)))
    return table


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
