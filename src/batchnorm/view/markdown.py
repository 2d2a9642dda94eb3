"""A run on one screen of Markdown, for a pull request or an issue."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from .facts import alert_lines, arm_results, damage_lines, extent, facts, health, nonfinite_steps, plural, some
from .terminal import LAYER_COLUMNS, READING, layer_cells
from .words import summarize

if TYPE_CHECKING:
    from ..runs.reader import Run

MOST_LAYERS, MOST_SENTENCES, MOST_LINES, MOST_FINDINGS = 12, 5, 6, 4
# In what Markdown would read something, unless a backslash stands before it: anywhere, and at the start of a line.
_MARKUP = re.compile(r"[\\`*_{}\[\]<>|~$&!]|^[+-](?=\s|$)")
_NUMBERED = re.compile(r"^(\d+)([.)])(?=\s|$)")
# Of what GitHub makes mentions, links and pictures whatever stands before it; alone in an element it makes none of it.
_LINKING = re.compile(r"[@#]|:(?=[\w+\\-]+:)|(?<=:)//|(?<=www)\.", re.IGNORECASE)
_PLAIN = re.compile(r"[^`|\\\x00-\x1f\x7f]+")


def markdown(run: Run, findings: Sequence[Sequence[str]] = ()) -> str:
    """Return a run as Markdown: how it went, what it says in words, its layers, what was found.

    Names of layers and all else that a run holds are text there too: no markup and, on GitHub, no mention and no link.

    Args:
        run: a run from `open_run`.
        findings: of each its severity, rule, place, evidence and remedy, worst first.
    """
    main = run.main
    lines = [f"### Batch normalization in {code(run.path.name)}", ""]
    lines += [f"**{text(run.status)}**, begun {text(run.created[:16])}: {text(extent(run))}. {text(health(run))}", ""]
    lines += _items(summarize(run).plain, MOST_SENTENCES)
    lines += _items([*alert_lines(run), *(f"damage: {line}" for line in damage_lines(run))], MOST_LINES)
    lines += _arms(run)
    lines += _layers(main)
    for severity, rule, where, evidence, remedy in findings[:MOST_FINDINGS]:
        lines += [f"- **{text(severity)}: {text(rule)}**, {text(where)}: {text(evidence)}"]
        lines += _block(remedy) if severity != "note" else []
    if len(findings) > MOST_FINDINGS:
        lines += [f"- and {plural(len(findings) - MOST_FINDINGS, 'more finding')}"]
    return "\n".join(lines).rstrip() + "\n"


def text(said: str) -> str:
    """Return what is said so that Markdown shows it as it is, in one line, and GitHub links nothing in it."""
    escaped = _NUMBERED.sub(r"\1\\\2", _MARKUP.sub(r"\\\g<0>", " ".join(_visible(said).split())))
    return _LINKING.sub(r"<span>\g<0></span>", escaped)


def code(said: str) -> str:
    """Return what is said as code, in which Markdown and GitHub read nothing."""
    said = " ".join(_visible(said).split()) or " "
    if _PLAIN.fullmatch(said):
        return f"`{said}`"
    # No fence holds every run of backticks, and a table is cut at a bar in a fence too.
    return f"<code>{re.sub('[^A-Za-z0-9 ]', lambda each: f'&#{ord(each[0])};', said)}</code>"


def _block(said: str) -> list[str]:
    """Return lines of code as a block of the list's last item, within a fence that they do not hold."""
    fence = "`" * max(3, *(len(ticks) + 1 for ticks in re.findall("`+", said)), 3)
    return ["", *(f"  {line}" for line in (f"{fence}python", *map(_visible, said.splitlines()), fence)), ""]


def _visible(said: str) -> str:
    return "".join(each if each.isprintable() or each.isspace() else "�" for each in said)


def _items(lines: Sequence[str], most: int) -> list[str]:
    if not lines:
        return []
    more = [f"- and {plural(len(lines) - most, 'more line')}"] if len(lines) > most else []
    return [*(f"- {text(line)}" for line in lines[:most]), *more, ""]


def _arms(run: Run) -> list[str]:
    results = arm_results(run)
    scores = {name: result.get("test_accuracy") for name, result in results.items()}
    rows = [(name, f"{score:.1%}") for name, score in scores.items() if score is not None]
    return _table(("arm", "test accuracy"), rows, ("test accuracy",)) if rows else []


def _layers(run: Run) -> list[str]:
    if not run.layers or not len(run.steps):
        return []
    said = {layer["name"]: layer for layer in facts(run)["layers"]}
    broken = dict.fromkeys(said, 0)
    for (name, _), steps in nonfinite_steps(run).items():
        broken[name] = max(broken[name], len(steps))
    worst = sorted(said, key=lambda name: (-broken[name], -_moved(run, name)))
    shown = worst[:MOST_LAYERS]
    rows = [(*layer_cells(said[name]), f"{broken[name]:,}" if broken[name] else "–") for name in shown]
    columns = (*LAYER_COLUMNS, "steps not finite")
    left = worst[MOST_LAYERS:]
    counted = f"and {plural(len(left), 'more layer')}: {some(left, 2)}. " if left else ""
    order = "worst first, then those that moved most; " if len(said) > 1 else ""
    return [*_table(columns, rows, (columns[1], columns[-1])), f"{text(counted)}{text(f'({order}{READING})')}", ""]


def _moved(run: Run, name: str) -> float:
    """How far the medians of gamma and beta went, as the statistics of every recorded step say it."""
    way = 0.0
    for quantity in ("gamma", "beta"):
        medians = run.stats(name, quantity)[:, 3].astype(np.float64)
        medians = medians[np.isfinite(medians)]
        way = float(np.hypot(way, medians[-1] - medians[0])) if len(medians) else way
    return way


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[str]) -> list[str]:
    """Return a table; the first column holds names."""
    lines = [columns, ["--:" if name in numbers else ":--" for name in columns]]
    lines += [(code(first), *map(text, rest)) for first, *rest in rows]
    return [*(f"| {' | '.join(line)} |" for line in lines), ""]
