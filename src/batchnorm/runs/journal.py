"""A journal: a file of checked frames that is only ever appended to, and that no crash makes unreadable.

A frame is a header of 20 bytes, little-endian, and a payload:

    magic    4 bytes   b"BNJ1"
    length   uint32    bytes of payload
    crc32    uint32    zlib's, of length, step and payload (as they stand in the file)
    step     int64     the training step that the payload belongs to
    payload

Frames go to the operating system whole, as soon as they are made. So a killed process leaves whole frames and at most
one torn one, at the end. Reading stops at the first bad frame, and appending begins by cutting the file there.
"""

from __future__ import annotations

import os
import struct
import time
import zlib
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .files import open_own, require_own

MAGIC = b"BNJ1"
HEADER = struct.Struct("<4sIIq")
_CHECKED = struct.Struct("<Iq")  # the part of the header that the checksum covers, beside the payload
_SYNC_SECONDS = 1.0
TORN = "torn frame"  # the rest may still come


def frame(step: int, payload: bytes) -> bytes:
    """The bytes of one frame."""
    return HEADER.pack(MAGIC, len(payload), _checksum(step, payload), step) + payload


def _checksum(step: int, payload: bytes | memoryview) -> int:
    return zlib.crc32(payload, zlib.crc32(_CHECKED.pack(len(payload), step)))


def _any_length(length: int) -> bool:
    return True


@dataclass(frozen=True)
class Frames:
    """The good frames at the start of a journal.

    Attributes:
        data: the file up to the end of its last good frame.
        steps: (T,) int64, the step of each frame.
        starts: (T,) int64, where in `data` each payload starts.
        lengths: (T,) int64, bytes of each payload.
        damage: one line saying what stopped the reading, or None when the file ends with a whole frame.
    """

    data: bytes | memoryview
    steps: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    damage: str | None

    def __len__(self) -> int:
        return len(self.steps)

    def payload(self, index: int) -> memoryview:
        start = int(self.starts[index])
        return memoryview(self.data)[start : start + int(self.lengths[index])]


def read_frames(path: str | os.PathLike[str], is_valid: Callable[[int], bool] = _any_length) -> Frames:
    """The frames of a journal up to the first bad one; none when there is no such file.

    Args:
        path: the journal.
        is_valid: says of a payload's length in bytes whether this journal can hold such a payload.
    """
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        data = b""
    scan = Scan()
    scan.go_on(memoryview(data), is_valid)
    kept = data[: scan.at] if scan.fault else data
    return scan.frames(kept, Path(path).name, len(data))


class Scan:
    """Where the good frames of a journal are, as far as it has been read.

    Attributes:
        at: the end of the last good one, in bytes.
        fault: what is wrong with what follows, `TORN` or worse; None where nothing does.
    """

    def __init__(self) -> None:
        self.at = 0
        self.fault: str | None = None
        self._steps, self._starts = array("q"), array("q")

    def go_on(self, view: memoryview, is_valid: Callable[[int], bool]) -> None:
        """Check the frames from `at` on.

        Args:
            view: the file from its beginning, or so much of it as has been read.
            is_valid: as in `read_frames`.
        """
        self.fault = None
        while self.at < len(view):
            self.fault = _fault(view, self.at, is_valid, self._steps[-1] if self._steps else None)
            if self.fault:
                return
            _, length, _, step = HEADER.unpack_from(view, self.at)
            self._steps.append(step)
            self._starts.append(self.at + HEADER.size)
            self.at += HEADER.size + length

    @property
    def last(self) -> int:
        """Where the last good frame begins; 0 without any."""
        return self._starts[-1] - HEADER.size if self._starts else 0

    def frames(self, data: bytes | memoryview, name: str, size: int) -> Frames:
        """The frames so far.

        Args:
            data: the file up to `at`.
            name: the file's, for the line that says what stopped the reading.
            size: of the file, in bytes.
        """
        damage = None
        if self.fault:
            place = f"{name}: {self.fault} at byte {self.at} of {size}"
            damage = f"{place}; kept the {len(self._steps)} whole frames before it"
        begin = np.array(self._starts, np.int64)
        ends = np.append(begin[1:] - HEADER.size, self.at) if len(begin) else begin
        return Frames(data, np.array(self._steps, np.int64), begin, ends - begin, damage)


def _fault(view: memoryview, at: int, is_valid: Callable[[int], bool], previous: int | None) -> str | None:
    """What is wrong with the frame at byte `at`, or None."""
    if len(view) - at < HEADER.size:
        return TORN
    magic, length, crc, step = HEADER.unpack_from(view, at)
    if magic != MAGIC:
        return "not a frame"
    if not is_valid(length):
        return f"frame of an impossible length ({length} bytes)"
    payload = view[at + HEADER.size : at + HEADER.size + length]
    if len(payload) < length:
        return TORN
    if _checksum(step, payload) != crc:
        return "frame with a wrong checksum"
    if previous is not None and step < previous:
        return f"frame of step {step} after one of step {previous}"
    return None


class Journal:
    """Appends frames to a file, which is cut after its last good frame, or before `before_step`, on opening.

    Args:
        path: the file; made when missing.
        before_step: keep only frames of earlier steps. None keeps all.
        is_valid: as in `read_frames`.
    Example:
        >>> import os, tempfile
        >>> path = os.path.join(tempfile.mkdtemp(), "a.bin")
        >>> with Journal(path) as journal:
        ...     journal.append([(0, b"zero"), (1, b"one")])
        >>> frames = read_frames(path)
        >>> frames.steps.tolist(), bytes(frames.payload(1))
        ([0, 1], b'one')
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        before_step: int | None = None,
        is_valid: Callable[[int], bool] = _any_length,
    ) -> None:
        require_own(Path(path))
        frames = read_frames(path, is_valid)
        keep = len(frames) if before_step is None else int(np.searchsorted(frames.steps, before_step))
        size = int(frames.starts[keep - 1] + frames.lengths[keep - 1]) if keep else 0
        self._file = open_own(Path(path), os.O_WRONLY | os.O_APPEND)
        os.ftruncate(self._file, size)
        self._synced = time.monotonic()
        self._dirty = False

    def append(self, records: Sequence[tuple[int, bytes]]) -> None:
        """Hand (step, payload) records to the operating system, in one write unless it takes fewer bytes."""
        left = memoryview(b"".join(frame(step, payload) for step, payload in records))
        while left:
            left = left[os.write(self._file, left) :]
        self._dirty = True
        self.sync()

    def sync(self, force: bool = False) -> None:
        """Have the disk hold what was appended, at most once a second unless forced."""
        now = time.monotonic()
        if self._dirty and (force or now - self._synced >= _SYNC_SECONDS):
            getattr(os, "fdatasync", os.fsync)(self._file)
            self._synced, self._dirty = now, False

    def close(self) -> None:
        if self._file >= 0:
            try:
                self.sync(force=True)
            finally:
                os.close(self._file)
                self._file = -1

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
