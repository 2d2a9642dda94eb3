"""A run as a notebook shows it: what `batchnorm show` says, in HTML."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..table import to_html
from .facts import extent, facts, plural
from .terminal import ARM_COLUMNS, LAYER_COLUMNS, READING, arm_cells, layer_cells

if TYPE_CHECKING:
    from ..runs.reader import Run

MOST_LAYERS = 60


def run_html(run: Run) -> str:
    """Return a run's state, its arms and its layers as tables; at most 60 layers, the rest counted."""
    said = facts(run, MOST_LAYERS)
    lines = [f"{run.path.name}: {said['status']}; {extent(run)}. {said['health']}", *said["alerts"]]
    tables = to_html("\n".join([*lines, *(f"damage: {line}" for line in said["damage"])]), (), ())
    if said["arms"]:
        rows = [arm_cells(name, arm) for name, arm in said["arms"].items()]
        tables += to_html("", ARM_COLUMNS, rows, ARM_COLUMNS[2:])
    if said["layers"]:
        tables += to_html("", LAYER_COLUMNS, map(layer_cells, said["layers"]), LAYER_COLUMNS[1:2])
        more = len(run.main.layers) - len(said["layers"])
        tables += to_html((f"and {plural(more, 'more layer')}; " if more else "") + READING, (), ())
    return tables
