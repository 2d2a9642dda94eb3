"""Small data files of every format that the lab reads, whole: something to spoil."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np


def _write(draw: Random, path: Path, data: bytes) -> Path:
    if draw.random() < 0.3:
        path, data = path.with_name(path.name + ".gz"), gzip.compress(data, mtime=0)
    path.write_bytes(data)
    return path


def csv(draw: Random, folder: Path) -> Path:
    lines = ["width,label,height", *(f"{i / 7:.3f},{'ab'[i % 2]},{-i}e1" for i in range(12))]
    return _write(draw, folder / "a.csv", "\n".join(lines).encode())


def npz(draw: Random, folder: Path) -> Path:
    x, y = np.arange(48.0).reshape(12, 4), np.arange(12) % 2
    kinds = (x, x.astype("f2"), x.astype("u1"), x.reshape(12, 2, 2), x.astype("c8"), x.astype("U"), x > 5)
    labels = (y, y.astype("U"), y.astype("f4"), y[:, None], y.astype("M8[s]"))
    save = draw.choice((np.savez, np.savez_compressed))
    more = {"x_test": x, "y_test": y} if draw.random() < 0.3 else {}
    save(folder / "a.npz", x=draw.choice(kinds), y=draw.choice(labels), **more)
    return folder / "a.npz"


def cifar(draw: Random, folder: Path) -> Path:
    record = b"".join(bytes([i % 3]) + bytes([i]) * 3072 for i in range(4))
    return _write(draw, folder / "data_batch_1.bin", record)


def idx(draw: Random, folder: Path) -> Path:
    code, kind = draw.choice(((8, "u1"), (9, "i1"), (11, ">i2"), (13, ">f4"), (14, ">f8")))
    images = np.arange(12 * 4).astype(kind).tobytes()
    path = folder / "train-images-idx3-ubyte"
    path.write_bytes(bytes([0, 0, code, 3]) + struct.pack(">3I", 12, 2, 2) + images)
    labels = bytes([0, 0, 8, 1]) + struct.pack(">I", 12) + bytes(i % 2 for i in range(12))
    path.with_name("train-labels-idx1-ubyte").write_bytes(labels)
    return draw.choice((path, folder))


WRITERS: tuple[Callable[[Random, Path], Path], ...] = (csv, npz, cifar, idx)
