"""Readers of .npz and .csv files: x and y arrays, and a table with a label column."""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import math
import sys
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np

from ..runs.parse import read_limit
from .binary import open_plain_or_gzip
from .errors import DataError, check_room, reading

LABEL_NAMES = ("label", "class", "target", "y")
TRAIN_NAMES, TEST_NAMES = (("x", "y"), ("x_train", "y_train")), ("x_test", "y_test")
# Deflate, the only compression NumPy writes, cannot shrink data further than this.
_DEFLATE_LIMIT = 1032
# What a field of one character takes while a line is read: Python's string, and its place in a list.
_BYTES_A_FIELD = 64


def read_npz(path: Path) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray] | None]:
    """Training part and, where the file has one, test part of an .npz file, each {"x": array, "y": array}.

    The training part is `x` and `y`, or `x_train` and `y_train`; the test part `x_test` and `y_test`. Arrays of Python
    objects are refused, so nothing is ever unpickled.

    Raises:
        DataError: not a zip file, an array missing, of objects, or of another size than its header says.
    """
    with reading(path, "an .npz file as numpy.savez writes it"):
        with zipfile.ZipFile(path) as archive:
            found = sorted(name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy"))
            train = next((pair for pair in TRAIN_NAMES if set(pair) <= set(found)), None)
            if train is None:
                expected = "arrays x and y, or x_train and y_train"
                raise DataError(path, "arrays", expected, ", ".join(found) or "none")
            test = TEST_NAMES if set(TEST_NAMES) <= set(found) else None
            names = (*train, *(test or ()))
            for name in names:
                _check_member(path, archive, name)
            _check_unpacked(path, [archive.getinfo(f"{name}.npy") for name in names])
        with np.load(path, allow_pickle=False) as arrays:
            parts = [dict(zip("xy", (arrays[n] for n in pair), strict=True)) for pair in (train, test) if pair]
    return parts[0], parts[1] if test else None


def _check_unpacked(path: Path, members: list[zipfile.ZipInfo]) -> None:
    """What is not compressed takes no more than the file."""
    unpacked = sum(member.file_size for member in members)
    if unpacked > path.stat().st_size:
        check_room(path, "arrays", unpacked)


def _check_member(path: Path, archive: zipfile.ZipFile, name: str) -> None:
    """Refuse an array whose header promises what its bytes cannot hold, before anything is allocated for it."""
    member = archive.getinfo(f"{name}.npy")
    if member.file_size > _DEFLATE_LIMIT * (member.compress_size + 1):
        found = f"{member.compress_size} bytes said to hold {member.file_size}"
        raise DataError(path, f"array {name}", "a compressed size that is possible", found)
    with archive.open(member) as file:
        try:
            shape, dtype = _npy_header(file)
        except ValueError as error:
            raise DataError(path, f"array {name}", "a .npy header", str(error).splitlines()[0]) from None
        header_size = file.tell()
    if dtype.hasobject:
        raise DataError(path, f"array {name}", "numbers", f"Python objects ({dtype}), which are not read")
    wanted = header_size + math.prod(shape) * dtype.itemsize
    if wanted != member.file_size or min(shape, default=0) < 0:
        found = f"{member.file_size} bytes"
        raise DataError(path, f"array {name}", f"{wanted} bytes for {dtype} of shape {shape}", found)


def _npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    return shape, dtype


def read_csv(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Features (N, F) float32 and labels (N,) str of a .csv file, plain or gzipped.

    The first line names the columns; the one called label, class, target or y holds the classes, as numbers or words;
    all the others are features.

    Raises:
        DataError: no header, no label column or two of them, a line of another length, a field that is not finite.
    """
    with (
        reading(path, "comma-separated UTF-8 text"),
        open_plain_or_gzip(path) as raw,
        io.TextIOWrapper(raw, "utf-8-sig", newline="") as text,
    ):
        lines = _csv_lines(path, text)
        _, header = next(lines, (0, []))
        columns = [i for i, name in enumerate(header) if name.strip().lower() in LABEL_NAMES]
        if len(columns) != 1:
            expected = f"a header with exactly one column called {', '.join(LABEL_NAMES[:-1])} or {LABEL_NAMES[-1]}"
            raise DataError(path, "line 1", expected, f"{len(columns)} of them in {_shorten(header)}")
        label_name = header.pop(columns[0])
        features, labels, size, widest = [], [], 0, 0
        for line, fields in lines:
            if len(fields) != len(header) + 1:
                raise DataError(path, f"line {line}", f"{len(header) + 1} fields", str(len(fields)))
            label = fields.pop(columns[0]).strip()
            if not label:
                raise DataError(path, f"line {line}, column {label_name}", "a class", "an empty field")
            values = _to_float32(fields)
            if values is None:
                at = next(i for i, field in enumerate(fields) if _to_float32([field]) is None)
                raise DataError(path, f"line {line}, column {header[at]}", "a finite number", repr(fields[at]))
            features.append(values)
            labels.append(label)
            # An array of words gives each the room of the longest.
            size, widest = size + sys.getsizeof(values) + sys.getsizeof(label), max(widest, len(label))
            check_room(path, f"line {line}", size + 4 * widest * len(labels))
        if not features or not header:
            raise DataError(path, "line 2", "at least one line with one feature", "none")
        return np.stack(features), np.array(labels)


def _csv_lines(path: Path, text: io.TextIOWrapper) -> Iterator[tuple[int, list[str]]]:
    """Number and fields of each line that is not blank."""
    rows = csv.reader(_whole_lines(path, text))
    try:
        for fields in rows:
            if fields:
                yield rows.line_num, fields
    except (csv.Error, UnicodeDecodeError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(path, f"line {rows.line_num + 1}", "comma-separated UTF-8 text", str(error)) from None


def _whole_lines(path: Path, text: io.TextIOWrapper) -> Iterator[str]:
    """The lines; none is so long that its fields, a few dozen bytes each, would take much more than the file."""
    longest = read_limit() // _BYTES_A_FIELD
    for number in itertools.count(1):
        line = text.readline(longest + 1)
        if len(line) > longest:
            check_room(path, f"line {number}", _BYTES_A_FIELD * len(line))
        if not line:
            return
        yield line


def _to_float32(fields: list[str]) -> np.ndarray | None:
    """The fields as finite float32 numbers, or None where one of them is not."""
    try:
        with np.errstate(over="ignore"):
            values = np.array(fields, np.float32)
    except ValueError:
        return None
    return values if np.isfinite(values).all() else None


def _shorten(fields: list[str], most: int = 8) -> str:
    return ",".join(fields[:most]) + (f",... ({len(fields)} columns)" if len(fields) > most else "") or "an empty file"
