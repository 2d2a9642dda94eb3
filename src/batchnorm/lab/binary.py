"""Readers of binary image files: MNIST's IDX and CIFAR-10's records, plain or gzipped, trusting no header."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import IO, cast

import numpy as np

from .errors import DataError, check_room, reading

IDX_DTYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
CIFAR10_SHAPE = (3, 32, 32)
_CHUNK_BYTES = 1 << 20


def open_plain_or_gzip(path: Path) -> IO[bytes]:
    """The file's bytes, uncompressed if it begins as gzip does, whatever it is called."""
    with open(path, "rb") as file:
        is_gzip = file.read(2) == b"\x1f\x8b"
    return cast("IO[bytes]", _Unpacked(path)) if is_gzip else open(path, "rb")


class _Unpacked(gzip.GzipFile):
    """A gzip file that ends with a DataError where it holds more than the limit to what is read."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "rb")
        self._path = path

    def read(self, size: int | None = -1) -> bytes:
        return self._checked(super().read(size))

    def read1(self, size: int = -1) -> bytes:
        return self._checked(super().read1(size))

    def _checked(self, piece: bytes) -> bytes:
        check_room(self._path, f"byte {self.tell()} of the data", self.tell())
        return piece


def read_at_most(path: Path, file: IO[bytes], count: int) -> bytes:
    """Up to `count` bytes, read in pieces: a header that lies about its size costs no memory.

    Raises:
        DataError: the gzip stream is cut short or damaged.
    """
    pieces, got = [], 0
    try:
        while got < count and (piece := file.read(min(_CHUNK_BYTES, count - got))):
            pieces.append(piece)
            got += len(piece)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(path, f"byte {got} of the data", "a whole gzip stream", f"damage ({error})") from None
    return b"".join(pieces)


def read_idx(path: Path) -> np.ndarray:
    """The array in an IDX file (MNIST's format), in its own shape and dtype, native byte order.

    Layout: two zero bytes, a byte for the type, a byte for the number of dimensions, each size as a big-endian uint32,
    then the values, last dimension fastest.

    Raises:
        DataError: wrong magic, unknown type, truncated, longer than the sizes say, or no values.
    Source: Yann LeCun, "The MNIST database", section "file formats".
    """
    with reading(path, "an IDX file"), open_plain_or_gzip(path) as file:
        magic = read_at_most(path, file, 4)
        if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] not in IDX_DTYPES or magic[3] == 0:
            expected = "IDX magic 00 00, a type of 08 09 0b 0c 0d 0e, a number of dimensions"
            raise DataError(path, "byte 0", expected, magic.hex(" ") or "an empty file")
        ndim = magic[3]
        sizes = read_at_most(path, file, 4 * ndim)
        if len(sizes) < 4 * ndim:
            raise DataError(path, "byte 4", f"{ndim} sizes of 4 bytes", f"{len(sizes)} bytes")
        shape = struct.unpack(f">{ndim}I", sizes)
        dtype = np.dtype(IDX_DTYPES[magic[2]])
        wanted = math.prod(shape) * dtype.itemsize
        if wanted == 0:
            raise DataError(path, "byte 4", "at least one value", f"sizes {shape}")
        # One byte more than the header promises, to see whether the file goes on.
        data = read_at_most(path, file, wanted + 1)
        if len(data) != wanted:
            found = "more" if len(data) > wanted else f"{len(data)}"
            raise DataError(path, f"byte {4 + 4 * ndim}", f"{wanted} bytes of values for sizes {shape}", found)
        return np.frombuffer(data, dtype).reshape(shape).astype(dtype.newbyteorder("="), copy=False)


def read_cifar10(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 3, 32, 32) and labels (N,), both uint8, of a CIFAR-10 binary batch.

    Layout: records of 3073 bytes: the label, 0 to 9, then 1024 red, 1024 green, 1024 blue values, row by row.

    Raises:
        DataError: empty, not whole records, or a label above 9.
    Source: Krizhevsky, "The CIFAR-10 dataset", section "binary version".
    """
    record = 1 + math.prod(CIFAR10_SHAPE)
    with reading(path, "a CIFAR-10 batch"), open_plain_or_gzip(path) as file:
        data = read_at_most(path, file, 1 << 62)
    if not data or len(data) % record:
        place = f"byte {len(data) - len(data) % record}"
        raise DataError(path, place, f"whole records of {record} bytes", f"{len(data) % record} bytes")
    records = np.frombuffer(data, np.uint8).reshape(-1, record)
    labels = records[:, 0]
    if (labels > 9).any():
        first = int(np.argmax(labels > 9))
        raise DataError(path, f"byte {first * record}", "a label from 0 to 9", str(labels[first]))
    return records[:, 1:].reshape(-1, *CIFAR10_SHAPE), labels
