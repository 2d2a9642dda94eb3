"""What the user can mend: errors whose message is one line that names the place and the cure."""

from __future__ import annotations

from os import PathLike


class LabError(ValueError):
    """A setting or a file that the lab cannot work with; `batchnorm train` prints its one line and exits with 2."""


class DataError(LabError):
    """A data file that is not what it should be: names file, place, what was expected and what is there."""

    def __init__(self, path: str | PathLike[str], place: str, expected: str, found: str) -> None:
        super().__init__(f"{path}: {place}: expected {expected}, found {found}")
