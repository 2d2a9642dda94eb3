"""What the user can mend: errors whose message is one line that names the place and the cure."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path

from ..runs.parse import beyond_limit, check_regular, read_limit

_MOST_FOUND = 300


class LabError(ValueError):
    """A setting or a file that the lab cannot work with; `batchnorm train` prints its one line and exits with 2."""


class DataError(LabError):
    """A data file that is not what it should be: names file, place, what was expected and what is there."""

    def __init__(self, path: str | PathLike[str], place: str, expected: str, found: str) -> None:
        found = " ".join(found.split())  # of the file: it may hold lines, and be long
        super().__init__(f"{path}: {place}: expected {expected}, found {found[:_MOST_FOUND]}")


@contextmanager
def reading(path: Path, expected: str) -> Iterator[None]:
    """Inside the block, whatever a broken file leads a reader to becomes a DataError that names the file.

    Args:
        path: the file, which must be a regular one.
        expected: what it should be.
    """
    try:
        check_regular(path)
        yield
    except LabError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise  # of the system, which names it
        raise DataError(path, "the file", expected, f"damage ({type(error).__name__}: {error})") from None


def check_room(path: Path, place: str, wanted: int) -> None:
    """Raise a DataError where what is read would take more bytes than the limit to it."""
    if wanted > read_limit():
        raise DataError(path, place, "less than the limit to what is read", beyond_limit(wanted))
