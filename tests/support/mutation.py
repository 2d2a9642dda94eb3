"""Files spoiled at random, from a seed: bytes, JSON values, frames with right checksums, and what is no file."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from batchnorm.runs.journal import HEADER, frame, read_frames

ODD_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 3, 2**31, 2**63, -(2**63) - 1, 10**400, 1e308, -0.5, 1e-320, float("nan")),
    *("", "x", "nan", "-inf", "1", "../..", "λ\u0000\n\x1b[31m", "a" * 3000),
    *([], {}, [[]], [None], {"": None}, {"all": []}, {"step": "x"}, {"step": [1], "test_accuracy": ["x"]}),
)
ODD_BYTES = (b"\0", b"\xff" * 8, b"9" * 400, b"[" * 6000, b"\n", b"{", b'"', b"NaN", b"1e999", b"\x1f\x8b", b"BNJ1")
ODD_FLOATS = (np.nan, np.inf, -np.inf, 0.0, -1.0, 3e38, 1e-45)


def mutate_bytes(draw: Random, data: bytes) -> bytes:
    """A few bytes flipped, cut out, repeated, put in, or the end cut off."""
    for _ in range(draw.choice((1, 1, 2, 5))):
        at = draw.randrange(len(data) + 1)
        end = min(len(data), at + draw.choice((1, 4, 16, 400)))
        way = draw.randrange(5)
        if way == 0 and at < len(data):
            data = data[:at] + bytes([data[at] ^ (1 << draw.randrange(8))]) + data[at + 1 :]
        elif way == 1:
            data = data[:at] + data[end:]
        elif way == 2:
            data = data[:end] + data[at:end] * draw.choice((1, 3)) + data[end:]
        elif way == 3:
            data = data[:at] + draw.choice(ODD_BYTES) + data[at:]
        elif draw.random() < 0.3:
            data = data[:at]
    return data


def mutate_value(draw: Random, value: Any) -> Any:
    """A JSON value with one value in it replaced, left out, or doubled."""
    if not isinstance(value, (dict, list)) or not value or draw.random() < 0.15:
        return draw.choice((*ODD_VALUES, _nested(draw.choice((20, 60, 900)))))
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = draw.choice(keys)
    changed = value.copy()
    if draw.random() < 0.1:
        del changed[key]
    elif draw.random() < 0.1 and isinstance(changed, list):
        changed.append(changed[key])
    else:
        changed[key] = mutate_value(draw, value[key])
    return changed


def _nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


def mutate_json(draw: Random, data: bytes) -> bytes:
    """Bytes of a JSON document, or of several lines of them, with a value replaced."""
    lines = data.splitlines() if data.count(b"\n{") else [data]
    at = draw.randrange(len(lines)) if lines else 0
    try:
        value = json.loads(lines[at])
    except (ValueError, IndexError):
        return mutate_bytes(draw, data)
    lines[at] = json.dumps(mutate_value(draw, value)).encode()
    return b"\n".join(lines) + b"\n"


def mutate_frames(draw: Random, path: Path) -> None:
    """Rewrite a journal: numbers, steps or lengths changed, every checksum right."""
    frames = read_frames(path)
    records = [(int(step), bytearray(frames.payload(k))) for k, step in enumerate(frames.steps)]
    for _ in range(draw.choice((1, 3, 30))):
        if not records:
            break
        at = draw.randrange(len(records))
        step, payload = records[at]
        way = draw.randrange(6)
        if way < 3 and len(payload) >= 4:
            start = 4 * draw.randrange(len(payload) // 4)
            count = min(draw.choice((1, 9, 72, 10**6)), (len(payload) - start) // 4)
            payload[start : start + 4 * count] = np.full(count, draw.choice(ODD_FLOATS), "<f4").tobytes()
        elif way == 3:
            records[at] = draw.choice((step, step // 2, -(2**63), 2**63 - 1, 2**53 + 1)), payload
        elif way == 4:
            payload *= draw.choice((0, 2, 7))
        else:
            records[at:at] = [records[at]] * draw.choice((1, 50))
    path.write_bytes(b"".join(frame(step, bytes(payload)) for step, payload in records))


def mutate_path(draw: Random, path: Path) -> None:
    """Put something else in a file's place: nothing, an empty file, a folder, a FIFO, a link."""
    path.unlink(missing_ok=True)
    way: Callable[[], Any] = draw.choice(
        (
            lambda: None,
            lambda: path.write_bytes(b""),
            path.mkdir,
            lambda: os.mkfifo(path),
            lambda: path.symlink_to(path),
            lambda: path.symlink_to("/dev/zero"),
            lambda: path.symlink_to(path.parent),
        )
    )
    way()


def mutate_run(draw: Random, whole: Path, to: Path) -> Path:
    """A copy of a run, or of an experiment, with one or two of its files spoiled."""
    if to.exists():
        shutil.rmtree(to)
    shutil.copytree(whole, to)
    for _ in range(draw.choice((1, 1, 2))):
        path = draw.choice(sorted(each for each in to.rglob("*") if each.is_file()) or [to / "run.json"])
        if draw.random() < 0.08:
            mutate_path(draw, path)
        elif path.suffix in (".json", ".jsonl") and draw.random() < 0.8:
            path.write_bytes(mutate_json(draw, path.read_bytes()))
        elif path.suffix == ".bin" and draw.random() < 0.7 and path.stat().st_size >= HEADER.size:
            mutate_frames(draw, path)
        elif path.is_file():
            path.write_bytes(mutate_bytes(draw, path.read_bytes()))
    return to
