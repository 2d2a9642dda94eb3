"""Following a run that grows: each look reads and checks only what was added since the last one.

What a look may find, and what it does then:

- a torn frame or line at the end of a run that is being written: the rest is yet to come;
- a file cut by a recorder that resumes, or put in another's place: read anew from its beginning;
- no folder yet, or an arm that has not begun: nothing, until it is there.

Files are opened for the time of a look only, and never mapped into memory: they may be cut at any time, and whoever
then reads on in a map of them is killed.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO, Any

import numpy as np

from .journal import HEADER, TORN, Frames, Scan
from .lines import add_rows, damage_of
from .reader import Run, read_facts, read_text
from .schema import ALERTS, PROBES, RESULTS, RUN, SCALARS, STATS, VECTORS, RunFacts
from .sources import Columns, IsValid, Rows, fault_of, no_frames

_FILES = (RUN, STATS, VECTORS, PROBES, SCALARS, ALERTS, RESULTS)
_BLOCK = 1 << 23  # bytes read at once
Stamp = tuple[int, int, int]


class Tail:
    """Follows the run in a folder, whoever writes it, and holds nothing that the writer needs.

    Args:
        path: the folder; it need not be there yet.
    Example:
        >>> import tempfile, torch, batchnorm as bn
        >>> tail = Tail(tempfile.mkdtemp() + "/run")
        >>> tail.refresh() is None
        True
        >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(3))
        >>> with bn.watch(model, tail.path):
        ...     _ = model(torch.randn(8, 3))
        ...     status = tail.refresh().status
        >>> status, tail.refresh().status, len(tail.refresh().steps)
        ('running', 'finished', 1)
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._seen: tuple[Stamp, bytes] | None = None
        self._facts: RunFacts | None = None
        self._files: _Grown | None = None

    def refresh(self) -> Run | None:
        """The run as it is on disk now, equal to what `open_run` returns; None while there is none.

        Runs returned before stay as they were, as far as they have been read.

        Raises:
            ValueError: run.json is not a run's, or of a later format.
        """
        try:
            # In this order: a file put in its place meanwhile is taken for another one at the next look.
            seen = _stamp(self.path / RUN), read_text(self.path)
        except FileNotFoundError:
            self._seen = self._facts = self._files = None
            return None
        if seen != self._seen or self._facts is None or self._files is None:
            before, self._facts = self._facts, read_facts(self.path, seen[1])
            # A recorder that takes a run over marks it as running before it cuts its files; one that ends it cuts none.
            has_ended = (
                before and before.status == "running" != self._facts.status and before.layers == self._facts.layers
            )
            if self._files is None or not has_ended:
                self._files = _Grown(self.path)
            self._seen = seen
        run = Run(self.path, self._facts, self._files)
        self._files.is_growing = run.status == "running"
        return run

    def stamp(self) -> object:
        """A value that differs from the one before where anything about the run has changed; costs a few µs.

        Raises:
            ValueError: as `refresh`.
        """
        run = self.refresh()
        if run is None or self._files is None or self._facts is None:
            return None
        arms = [self._files.tail(name).stamp() for name in self._facts.arms or ()]
        return run.status, [_stamp(self.path / name) for name in _FILES], arms


class _Grown:
    """A run's files, of which the beginning is known."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._journals: dict[str, _Journal] = {}
        self._lines: dict[str, _Lines] = {}
        self._tails: dict[str, Tail] = {}
        self._columns, self._of = Columns(), -1
        self.is_growing = False

    def frames(self, name: str, is_valid: IsValid) -> Frames:
        fault = fault_of(self._path / name)
        if fault is not None:
            return no_frames(fault)
        journal = self._journals.setdefault(name, _Journal(self._path / name))
        journal.look(is_valid)
        return journal.frames(self.is_growing)

    def lines(self, name: str) -> Rows:
        fault = fault_of(self._path / name)
        if fault is not None:
            return [], fault
        lines = self._lines.setdefault(name, _Lines(self._path / name))
        lines.look()
        return lines.rows(self.is_growing)

    def columns(self, records: np.ndarray) -> Columns:
        beginnings = self._journals[STATS].beginnings if STATS in self._journals else 0
        if beginnings != self._of or len(records) < len(self._columns):
            self._columns, self._of = Columns(), beginnings
        self._columns.extend(records)
        return self._columns.copy()

    def tail(self, arm: str) -> Tail:
        return self._tails.setdefault(arm, Tail(self._path / arm))

    def arm(self, name: str) -> Run | str | None:
        try:
            return self.tail(name).refresh()
        except (OSError, ValueError) as error:
            return str(error)


class _File:
    """A file that only grows, unless it is cut: then it is read from its beginning again.

    Attributes:
        at: up to where it is known, in bytes.
        beginnings: how often it was begun.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp: Stamp | None = None
        self.beginnings = 0
        self._begin()

    def _begin(self) -> None:
        self.at = self.size = 0
        self._mark = 0, b""  # the last frame's header or the last line, and where it stands
        self.beginnings += 1

    def _opened(self) -> IO[bytes] | None:
        """The file, where it is not as it was at the last look; begun anew if it does not go on from there."""
        try:
            file = open(self._path, "rb", buffering=0)  # noqa: SIM115 (closed by who gets it)
        except FileNotFoundError:
            self._stamp = None
            if self.size:
                self._begin()
            return None
        found = _stamp_of(os.fstat(file.fileno()))
        if found == self._stamp:
            file.close()
            return None
        place, mark = self._mark
        file.seek(place)
        same_file = self._stamp is not None and found[0] == self._stamp[0]
        if self.size and not (same_file and found[1] >= self.at and file.read(len(mark)) == mark):
            self._begin()
        self._stamp, self.size = found, found[1]
        return file


class _Journal(_File):
    """A journal, of which the good frames so far are in memory."""

    def _begin(self) -> None:
        super()._begin()
        self._scan = Scan()
        self._data = np.empty(0, np.uint8)

    def look(self, is_valid: IsValid) -> None:
        """Read and check what was added."""
        file = self._opened()
        if file is None:
            return
        with file:
            wanted = _BLOCK
            while self.at < self.size:
                end = min(self.at + wanted, self.size)
                view = self._room(end)
                file.seek(self.at)
                got = self.at + _fill(file, view[self.at : end])
                self._scan.go_on(view[:got], is_valid)
                is_whole, self.at = self._scan.at > self.at, self._scan.at
                if self._scan.fault not in (None, TORN) or got < end or got == self.size:
                    break
                if not is_whole:  # a frame larger than a block: how large, says its header
                    wanted = HEADER.size + HEADER.unpack_from(view, self.at)[1]
                    if self.at + wanted > self.size:
                        break
        last = self._scan.last
        self._mark = last, bytes(self._data[last : last + HEADER.size]) if self.at else b""

    def frames(self, is_growing: bool) -> Frames:
        """The good frames; a torn one at the end of a growing file is no damage."""
        view = self._data.data[: self.at].toreadonly()
        frames = self._scan.frames(view, self._path.name, self.size)
        if is_growing and self._scan.fault == TORN:
            return Frames(frames.data, frames.steps, frames.starts, frames.lengths, None)
        return frames

    def _room(self, end: int) -> memoryview:
        """The bytes so far, with room up to `end`; those handed out before stay where they are."""
        if end > len(self._data):
            larger = np.empty(
                max(self.size, end) * 9 // 8, np.uint8
            )  # room for what comes: a move costs most of a look
            larger[: self.at] = self._data[: self.at]
            self._data = larger
        return self._data.data


class _Lines(_File):
    """A .jsonl file, of which the rows so far are in memory."""

    def _begin(self) -> None:
        super()._begin()
        self._rows: list[dict[str, Any]] = []
        self._is_garbage = False

    def look(self) -> None:
        """Read what was added."""
        file = self._opened()
        if file is None:
            return
        with file:
            file.seek(self.at)
            data = file.read(self.size - self.at) or b""
        read, self._is_garbage = add_rows(self._rows, data)
        if read:
            begin = data.rfind(b"\n", 0, read - 1) + 1
            self._mark = self.at + begin, data[begin:read]
            self.at += read

    def rows(self, is_growing: bool) -> Rows:
        is_torn = self.at < self.size and not is_growing
        return list(self._rows), damage_of(self._path.name, self._rows, self._is_garbage, is_torn)


def _fill(file: IO[bytes], view: memoryview) -> int:
    """Read into the view until it is full or the file ends."""
    got = 0
    while got < len(view) and (more := file.readinto(view[got:])):  # pyright: ignore[reportAttributeAccessIssue]
        got += more
    return got


def _stamp(path: Path) -> Stamp:
    """What of a file changes when it does."""
    try:
        return _stamp_of(os.stat(path))
    except OSError:
        return 0, 0, 0


def _stamp_of(found: os.stat_result) -> Stamp:
    return found.st_ino, found.st_size, found.st_mtime_ns
