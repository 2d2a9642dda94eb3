"""Where a Run gets the contents of its files from: each read whole when asked for; `tail` reads only what is new."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from .journal import Frames, read_frames
from .lines import read_lines
from .parse import check_regular
from .schema import COLUMNS

if TYPE_CHECKING:
    from .reader import Run

IsValid = Callable[[int], bool]
Rows = tuple[list[dict[str, Any]], "str | None"]  # objects of whole lines, and what follows them that is none


class Files(Protocol):
    """The contents of a run's files."""

    def frames(self, name: str, is_valid: IsValid) -> Frames:
        """The frames of a journal; none, and what is wrong, where no regular file is."""
        ...

    def lines(self, name: str) -> Rows:
        """The rows of a .jsonl file."""
        ...

    def columns(self, records: np.ndarray) -> Columns:
        """What is asked of every record, side by side."""
        ...

    def arm(self, name: str) -> Run | str | None:
        """The run of an arm, or why it cannot be read; None where there is none."""
        ...


class Whole:
    """A run's files, each read whole.

    Args:
        path: the run's folder.
        open: opens an arm.
    """

    def __init__(self, path: Path, open: Callable[[Path], Run | str | None]) -> None:
        self._path, self._open = path, open

    def frames(self, name: str, is_valid: IsValid) -> Frames:
        fault = fault_of(self._path / name)
        return read_frames(self._path / name, is_valid) if fault is None else no_frames(fault)

    def lines(self, name: str) -> Rows:
        return read_lines(self._path / name)

    def columns(self, records: np.ndarray) -> Columns:
        columns = Columns()
        columns.extend(records)
        return columns

    def arm(self, name: str) -> Run | str | None:
        return self._open(self._path / name)


class Columns:
    """What is asked of every record of `stats-0001.bin`, layer by layer and densely.

    In the file it lies thousands of bytes apart, so that a pass over one layer would touch the memory of all.

    Attributes:
        counts: (layers, T) int64. forwards: (layers, T) int32.
        nonfinite: (layers, T, quantities) float32.
        broken: (layers, quantities) bool, whether any of it was above 0. None of them may be written to.
    """

    def __init__(self) -> None:
        self._length = 0
        self._kept: dict[str, np.ndarray] = {}
        self.broken: np.ndarray = np.zeros((0, 0), bool)
        self._share()

    def __len__(self) -> int:
        return self._length

    def extend(self, records: np.ndarray) -> None:
        """Take what is new in the records, whose beginning is known already."""
        parts = {"count": records["count"], "forwards": records["forwards"]}
        parts["nonfinite"] = records["stats"][..., COLUMNS.index("nonfinite")]
        for name, values in parts.items():
            kept, length = self._kept.get(name), len(records)
            if kept is None or length > kept.shape[1]:
                # Room for what comes, so that a run that grows is seldom moved; who has the old one may keep it.
                room = length * 9 // 8
                new = np.empty((values.shape[1], room, *values.shape[2:]), values.dtype)
                if kept is not None:
                    new[:, : self._length] = kept[:, : self._length]
                self._kept[name] = kept = new
            kept[:, self._length : length] = values[self._length :].swapaxes(0, 1)
        is_new = (parts["nonfinite"][self._length :] > 0).any(0)
        self.broken = np.logical_or(self.broken, is_new) if self.broken.size else np.asarray(is_new)
        self._length = len(records)
        self._share()

    def copy(self) -> Columns:
        """One that stays as long as it is when this one is extended; the numbers are shared."""
        other = Columns()
        other._length, other._kept, other.broken = self._length, dict(self._kept), self.broken
        other._share()
        return other

    def _share(self) -> None:
        none = np.empty((0, 0))
        views = [self._kept.get(name, none)[:, : self._length] for name in ("count", "forwards", "nonfinite")]
        for view in views:
            view.flags.writeable = False
        self.counts, self.forwards, self.nonfinite = views


def fault_of(path: Path) -> str | None:
    """Why a file cannot be read; None where it can, or is not there."""
    try:
        check_regular(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        return str(error)
    return None if os.access(path, os.R_OK) else f"{path.name}: no permission to read it"


def no_frames(damage: str | None) -> Frames:
    """What a journal that is not there holds."""
    none = np.empty(0, np.int64)
    return Frames(b"", none, none, none, damage)
