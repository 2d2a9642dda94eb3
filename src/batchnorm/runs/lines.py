"""Files of one JSON object a line, each with its step: the scalars and the alerts of a run."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .files import open_own, require_own, write_atomically
from .parse import parse, read_regular
from .schema import Line


def to_jsonable(number: Any) -> int | float | str | bool:
    """A number as JSON can hold it: what JSON lacks becomes "nan", "inf" or "-inf"."""
    if isinstance(number, (bool, np.bool_)):
        return bool(number)
    if hasattr(number, "item"):  # NumPy's and torch's scalars
        number = number.item()
    if not isinstance(number, (int, float)):
        raise TypeError(f"a logged value must be one number, got {type(number).__name__}: {number!r}")
    return number if math.isfinite(number) else str(float(number))


def _from_jsonable(value: Any) -> Any:
    return float(value) if value in ("nan", "inf", "-inf") else value


def read_lines(path: Path) -> tuple[list[dict[str, Any]], str | None]:
    """The objects up to the first bad line, and one line saying what was wrong with that one, or None."""
    try:
        data = read_regular(path)
    except FileNotFoundError:
        return [], None
    except ValueError as error:
        return [], str(error)
    rows: list[dict[str, Any]] = []
    at, is_garbage = add_rows(rows, data)
    return rows, damage_of(path.name, rows, is_garbage, is_torn=at < len(data))


def add_rows(rows: list[dict[str, Any]], data: bytes) -> tuple[int, bool]:
    """Append the objects of the whole lines in `data`; return where the last good one ends, and if a bad one follows.

    A whole line ends with a newline: what follows the last one is torn.
    """
    at = 0
    while (end := data.find(b"\n", at)) >= 0:
        row = _parse(data[at:end])
        if row is None:
            return at, True
        rows.append(row)
        at = end + 1
    return at, False


def damage_of(name: str, rows: Sequence[object], is_garbage: bool, is_torn: bool) -> str | None:
    """One line on what follows the good rows of a file; None where nothing does."""
    kept = f"kept the {len(rows)} lines before it"
    if is_garbage:
        return f"{name}: garbage in line {len(rows) + 1}; {kept}"
    return f"{name}: torn last line; {kept}" if is_torn else None


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        row = parse(line, Line)
    except ValueError:
        return None
    step = row.get("step")
    if type(step) is not int or not -(2**63) <= step < 2**63:
        return None
    return {key: _from_jsonable(value) for key, value in row.items()}


class Lines:
    """Appends objects to a .jsonl file, from which torn lines, and those from `before_step` on, go on opening."""

    def __init__(self, path: Path, before_step: int | None = None) -> None:
        require_own(path)
        rows, damage = read_lines(path)
        kept = [row for row in rows if before_step is None or row["step"] < before_step]
        if damage or len(kept) < len(rows):
            write_atomically(path, _encode(kept))
        self._file = open_own(path, os.O_WRONLY | os.O_APPEND)

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Hand the rows to the operating system, in one write unless it takes fewer bytes."""
        left = memoryview(_encode(rows))
        while left:
            left = left[os.write(self._file, left) :]

    def close(self) -> None:
        if self._file >= 0:
            try:
                os.fsync(self._file)
            finally:
                os.close(self._file)
                self._file = -1


def _encode(rows: Sequence[Mapping[str, Any]]) -> bytes:
    plain = ({key: v if isinstance(v, str) else to_jsonable(v) for key, v in row.items()} for row in rows)
    return "".join(json.dumps(row, separators=(",", ":"), allow_nan=False) + "\n" for row in plain).encode()
