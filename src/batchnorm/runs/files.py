"""Files that are written: made here or a run's own, and never another file that a link leads to."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path
from stat import S_ISLNK, S_ISREG

_BINARY = getattr(os, "O_BINARY", 0)  # where lines end as they are written: Windows


def write_atomically(path: Path, data: bytes) -> None:
    """Put `data` at `path`: at any moment, and after any crash, the old file is there whole or the new one.

    A link at `path` is replaced, not followed.
    """
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    # Made here, whatever somebody put in the folder: an exclusive creation follows no link.
    made = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _BINARY, 0o666)
    try:
        with open(made, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(made)
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def require_own(path: Path) -> None:
    """Let pass what does not exist, and a regular file of one name.

    Raises:
        FileExistsError: a link, symbolic or hard, by which another file would be written; a folder, a pipe.
    """
    with suppress(FileNotFoundError):
        found = os.lstat(path)
        if S_ISREG(found.st_mode) and found.st_nlink == 1:
            return
        is_linked = S_ISLNK(found.st_mode) or S_ISREG(found.st_mode)
        what = "a link" if is_linked else "something else"
        raise FileExistsError(f"{path} must be a regular file with one name, but is {what}; move it away")


def open_own(path: Path, flags: int) -> int:
    """Open a file of a run for writing, and make it where it is missing.

    Args:
        path: the file.
        flags: os.O_WRONLY and the like.
    Returns:
        The descriptor.
    Raises:
        FileExistsError: as `require_own`.
    """
    require_own(path)
    flags |= os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | _BINARY
    return os.open(path, flags, 0o666)
