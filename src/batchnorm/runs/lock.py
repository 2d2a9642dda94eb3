"""One writer a folder: a lock that the operating system frees when its holder ends, be it by kill -9."""

from __future__ import annotations

import errno
import os
import weakref
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

LOCK = ".lock"
_fcntl: Any = import_module("fcntl") if find_spec("fcntl") else None  # Windows has none: nothing is refused there


class Lock:
    """Holds a folder for writing until `release`, until nobody has the object any more, or until the process ends.

    The lock file stays in the folder: were it removed, two processes could each lock a file of that name.

    Args:
        path: the folder.

    Raises:
        BlockingIOError: another process, or this one, holds it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        file = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        self.release = weakref.finalize(self, os.close, file)
        try:
            if _fcntl:
                _fcntl.flock(file, _fcntl.LOCK_EX | _fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(file, 20).decode(errors="replace").strip() or "unknown"
            self.release()
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                who = "this process" if holder == str(os.getpid()) else f"another process (pid {holder})"
                raise BlockingIOError(f"{path} is being written by {who}: wait for its end, or stop it") from None
            return  # a file system without locks: write as if there were none
        os.ftruncate(file, 0)
        os.write(file, f"{os.getpid()}\n".encode())
        _held.add(self)


_held: weakref.WeakSet[Lock] = weakref.WeakSet()


def _leave_to_parent() -> None:
    """In a forked child, such as a DataLoader's worker: it may outlive its parent, and must not go on holding."""
    for lock in list(_held):
        lock.release()


with suppress(AttributeError):  # where there is no fork
    os.register_at_fork(after_in_child=_leave_to_parent)
