"""Reading what others wrote: regular files, JSON of a type, a limit to what is unpacked; or a ValueError that says why.

Whatever is odd in a file ends here as a ValueError of one line: nested too deep, of another type, beyond a limit.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import msgspec

LIMIT = "BATCHNORM_READ_LIMIT"
_USUAL_LIMIT = 1 << 30
MOST_NESTED = 32  # objects and arrays within one another: what goes through a value in Python recurses


def check_regular(path: Path) -> None:
    """Raise a ValueError where a folder, a FIFO or a device stands for a file: opening one may never end.

    Raises:
        FileNotFoundError: there is nothing.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError(f"{path.name} must be a regular file, but is not")


def read_regular(path: Path) -> bytes:
    """The bytes of a file; raises as `check_regular` does."""
    check_regular(path)
    return path.read_bytes()


def read_limit() -> int:
    """How many bytes what is read from a file may take, where they are more than the file has.

    Raises:
        ValueError: the environment variable BATCHNORM_READ_LIMIT, which raises it, is no number.
    """
    said = os.environ.get(LIMIT, str(_USUAL_LIMIT))
    if not said.isdecimal():
        raise ValueError(f"{LIMIT} must be a number of bytes, got {said!r}")
    return int(said)


def check_size(wanted: int, what: str) -> None:
    """Raise a ValueError where so many bytes are more than `read_limit`, before they are allocated."""
    if wanted > read_limit():
        raise ValueError(f"{what}: {beyond_limit(wanted)}")


def beyond_limit(wanted: int) -> str:
    """What to say of so many bytes, which are too many."""
    return f"{wanted:,} bytes or more, beyond the limit of {read_limit():,}; if you trust the file, raise {LIMIT}"


def parse(data: bytes, kind: Any) -> Any:
    """The JSON value in `data`, in Python's own types, once it is known to be of the type `kind`.

    Raises:
        ValueError: it is not JSON, not of that type, or nested too deep.
    """
    try:
        value = json.loads(data)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    _check_depth(value)
    typed(value, kind)
    return value


def typed(value: Any, kind: Any) -> Any:
    """What `kind` makes of a value of Python's own types; ValueError where it is of another type."""
    try:
        return msgspec.convert(value, kind)
    except OverflowError as error:  # an integer that no float holds
        raise ValueError(str(error)) from None


_TOO_DEEP = f"values must be nested at most {MOST_NESTED} deep"


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MOST_NESTED):
        level = [
            inner
            for each in level
            if isinstance(each, (dict, list))
            for inner in (each.values() if isinstance(each, dict) else each)
        ]
        if not level:
            return
    raise ValueError(_TOO_DEEP)
