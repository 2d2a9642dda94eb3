"""What was measured, as tables in Markdown and as JSON."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from common import header, write

from . import steps
from .entries import Entry
from .measure import EAGER, EVENTS, GRAPH, OURS, WALL, WITHOUT_CUDNN, Result
from .targets import Sum, Target, sums, targets

NOTES = """
T is the bytes of a tensor. Times are medians over rounds, in which all sides take turns; ratios are medians, over
rounds, of a side's time to ours: above 1, ours is faster.

- **ours, µs**: the device's time of our step as a replayed graph, nothing in its caches before. Where it could not be
  captured, by events, with an asterisk.
- **of the floor**: the bytes that two passes cannot do without (BN and an activation 3 T forward and 5 T backward, an
  addition 1 T and 2 T more) at the bandwidth of a copy of the same tensor, over our time. Over 100 %: caches.
- **eager**, **cuDNN off**, **compile**, **max-autotune**: torch's time to ours, of the device. cuDNN off is
  torch's own kernels; max-autotune is without CUDA graphs of its own.
- **events**: eager's time to ours between two events, called from Python while the device was still busy.
- **wall**: eager's time to ours of ten calls in a row, on an idle device, to their end.
- **served by**: which implementation of ours computed (`bn.backends`): gpu is our kernels, native torch's batch norm.
""".strip().splitlines()
COLUMNS = ("shape", "layers", "dtype", "channels", "what", "mode", "served by", "ours, µs", "of the floor")
RATIOS = ("eager", "cuDNN off", "compile", "max-autotune", "events", "wall")


@dataclass
class Report:
    """Everything so far; `copies` are bytes and GB/s."""

    facts: dict[str, str]
    smoke: bool = False
    copies: list[tuple[int, float]] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)
    steps: list[steps.Result] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    why_left_out: str = ""

    @property
    def targets(self) -> list[Target]:
        return targets(self.results, self.steps, self.facts["device"])

    def save(self, folder: Path) -> None:
        """Write gpu.md and gpu.json."""
        write(folder / "gpu.json", _json(self.to_dict()))
        write(folder / "gpu.md", "\n".join(self.lines()) + "\n")

    def to_dict(self) -> dict[str, Any]:
        """What JSON can write."""
        return {
            "smoke": self.smoke,
            "machine": self.facts,
            "targets": [asdict(target) for target in self.targets],
            "copies": [{"bytes": size, "gb_per_s": speed} for size, speed in self.copies],
            "networks": [asdict(each) for each in sums(self.results)],
            "steps": [asdict(each) for each in self.steps],
            "entries": [_facts(result) for result in self.results],
            "left_out": self.left_out,
            "why_left_out": self.why_left_out,
        }

    def lines(self) -> list[str]:
        """The page."""
        title = "Smoke run: these figures mean nothing" if self.smoke else "Batch normalization on a GPU"
        found = ["## What is to be reached", "", *map(target_line, self.targets), ""]
        copies = [(f"{size / 1e6:,.1f}", f"{speed:,.0f}") for size, speed in self.copies]
        found += _table("Copies", ("MB", "GB/s, read and written"), copies)
        columns = ("layers of", "number", "ours, ms", "eager, ms", "floor, ms", "eager / ours")
        found += _table("The layers of a network, all together", columns, map(_sum_cells, sums(self.results)))
        columns = ("step", "layers", "ms by events", "torch / it", "ms by the wall's clock", "torch / it", "memory, GB")
        found += _table("A training step of ResNet-50, bfloat16, channels last", columns, self._step_cells())
        measured = [result for result in self.results if not result.failed]
        found += _table("Cases", (*COLUMNS, *RATIOS), map(cells, measured))
        return [*header(title, self._where()), *found, *NOTES, *self._not_measured()]

    def _where(self) -> str:
        served = Counter(result.served_by for result in self.results if not result.failed)
        facts = ", ".join(f"{name} {value}" for name, value in self.facts.items() if name != "device")
        by = ", ".join(f"{name} {number}" for name, number in served.most_common())
        return f"{self.facts['device']}: {facts}. Cases served by: {by or 'nobody yet'}."

    def _step_cells(self) -> Iterable[tuple[str, ...]]:
        for result in self.steps:
            for name, ms in result.ms.get(EVENTS, {}).items():
                ratios = [result.ratios[clock].get(name) for clock in (EVENTS, WALL)]
                by_events, by_wall = ("" if ratio is None else f"{ratio:.3f}" for ratio in ratios)
                memory = f"{result.peak_gb[name]:.1f}"
                yield result.kind, name, f"{ms:.2f}", by_events, f"{result.ms[WALL][name]:.2f}", by_wall, memory

    def _not_measured(self) -> list[str]:
        failed = [f"- {_named(result)}: {result.failed}" for result in [*self.results, *self.steps] if result.failed]
        notes = Counter(note for result in [*self.results, *self.steps] for note in result.notes)
        noted = [f"- {note}" + (f" ({number} times)" if number > 1 else "") for note, number in notes.items()]
        left = [f"- {name} ({number})" for name, number in Counter(self.left_out).items()]
        sections = {
            "Wrong, or not measured": failed,
            "Sides that were not measured": noted,
            f"Left out: {self.why_left_out}": left,
        }
        return [line for title, found in sections.items() if found for line in ("", f"## {title}", "", *found)]


def _json(facts: dict[str, Any]) -> str:
    """An object with a line for each item of each list."""

    def written(value: Any) -> str:
        items = [json.dumps(item, allow_nan=False) for item in value] if isinstance(value, list) else []
        return "[\n" + ",\n".join(items) + "\n]" if items else json.dumps(value, allow_nan=False)

    return "{\n" + ",\n".join(f"{json.dumps(key)}: {written(value)}" for key, value in facts.items()) + "\n}\n"


def target_line(target: Target) -> str:
    """A target, with yes or no."""
    word = {True: "reached", False: "**not reached**", None: "cannot be said"}[target.reached]
    return f"- {target.text}: {word}. {target.figure[0].upper()}{target.figure[1:]}."


def cells(result: Result) -> tuple[str, ...]:
    """A row of the table of cases."""
    entry = result.entry
    ours = f"{result.device_us[OURS]:,.1f}" + ("" if result.device == GRAPH else "*")
    ratios = [result.ratio(side) for side in (EAGER, WITHOUT_CUDNN, "compile", "max-autotune")]
    ratios += [result.ratio(EAGER, clock) for clock in (EVENTS, WALL)]
    shown = ("" if ratio is None else f"{ratio:.2f}" for ratio in ratios)
    shape, *rest = entry.case.words
    return shape, f"{entry.count}", *rest, result.served_by, ours, f"{result.fraction or 0:.0%}", *shown


def _sum_cells(each: Sum) -> tuple[str, ...]:
    figures = each.ours_ms, each.eager_ms, each.floor_ms, each.eager_ms / each.ours_ms
    return each.series, f"{each.layers}", *(f"{figure:.2f}" for figure in figures)


def _table(title: str, columns: Sequence[str], rows: Iterable[tuple[str, ...]]) -> list[str]:
    body = [f"| {' | '.join(row)} |" for row in rows]
    return [f"## {title}", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|", *body, ""] if body else []


def _named(result: Result | steps.Result) -> str:
    return name_of(result.entry) if isinstance(result, Result) else f"ResNet-50's step, {result.kind}"


def name_of(entry: Entry) -> str:
    """The entry in a line."""
    return " ".join((entry.group + ":", *entry.case.words))


def _facts(result: Result) -> dict[str, Any]:
    entry = result.entry
    names = ("shape", "dtype", "channels", "what", "mode")
    return {
        "group": entry.group,
        "layers": entry.count,
        **dict(zip(names, entry.case.words, strict=True)),
        "bytes": entry.case.bytes,
        "floor_bytes": entry.case.bytes * entry.case.traffic(resident=False),
        "served_by": result.served_by,
        "device_clock": result.device,
        "us": result.us,
        "ratios": result.ratios,
        "of_the_floor": result.fraction,
        "notes": result.notes,
        "failed": result.failed,
    }
