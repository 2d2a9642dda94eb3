"""One writer a folder: a lock that the operating system frees when its holder ends, be it by kill -9."""

from __future__ import annotations

import errno
import os
import time
import weakref
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .files import open_own

LOCK = ".lock"
_fcntl: Any = import_module("fcntl") if find_spec("fcntl") else None  # Windows has none: nothing is refused there


class Lock:
    """Holds a folder for writing until `release`, until nobody has the object any more, or until the process ends.

    The lock file stays in the folder: were it removed, two processes could each lock a file of that name.

    Args:
        path: the folder.

    Raises:
        BlockingIOError: another process, or this one, holds it.
        FileExistsError: the lock file is a link, or no file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        file = open_own(path / LOCK, os.O_RDWR)
        self.release = weakref.finalize(self, os.close, file)
        try:
            if _fcntl:
                _lock(file)
        except OSError as error:
            holder = os.read(file, 20).decode(errors="replace").strip() or "unknown"
            self.release()
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                who = "this process" if holder == str(os.getpid()) else f"another process (pid {holder})"
                raise BlockingIOError(f"{path} is being written by {who}: wait until it ends, or stop it") from None
            return  # a file system without locks: write as if there were none
        os.ftruncate(file, 0)
        os.write(file, f"{os.getpid()}\n".encode())
        _held.add(self)


def _lock(file: int) -> None:
    """Take the lock; who only asks whether it is held, as `is_held` does, has it for a moment too."""
    for _ in range(20):
        with suppress(BlockingIOError):
            return _fcntl.flock(file, _fcntl.LOCK_EX | _fcntl.LOCK_NB)
        time.sleep(0.005)
    return _fcntl.flock(file, _fcntl.LOCK_EX | _fcntl.LOCK_NB)


def is_held(path: Path) -> bool | None:
    """Whether anybody holds the folder; None where that cannot be known."""
    if not _fcntl:
        return None
    try:
        file = os.open(path / LOCK, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))  # a pipe keeps nobody waiting
    except OSError:
        return None
    try:
        _fcntl.flock(file, _fcntl.LOCK_SH | _fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return None
    finally:
        os.close(file)
    return False


_held: weakref.WeakSet[Lock] = weakref.WeakSet()


def _leave_to_parent() -> None:
    """In a forked child, such as a DataLoader's worker: it may outlive its parent, and must not go on holding."""
    for lock in list(_held):
        lock.release()


with suppress(AttributeError):  # where there is no fork
    os.register_at_fork(after_in_child=_leave_to_parent)
