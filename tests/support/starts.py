"""Tests that start processes say so, by the mark `processes` or `browser`: so `make quick` leaves out all of them."""

from __future__ import annotations

import functools
import multiprocessing.process
import subprocess
from typing import Any

import pytest

MARKS = ("processes", "browser")
_running: list[pytest.Item] = []


def watch() -> None:
    """From now on, a process that a test without these marks starts is that test's failure."""
    for owner, name in ((subprocess.Popen, "__init__"), (multiprocessing.process.BaseProcess, "start")):
        setattr(owner, name, _checked(getattr(owner, name)))


def _checked(start: Any) -> Any:
    @functools.wraps(start)
    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        asks_for_the_processor = args[:1] == (["uname", "-p"],)  # Python's platform module, for h5py
        if _running and not asks_for_the_processor and not any(_running[-1].get_closest_marker(mark) for mark in MARKS):
            pytest.fail(f"this test starts a process, and is not marked so: {args[:1] or self}")
        return start(self, *args, **kwargs)

    return checked


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Any:
    _running.append(item)
    try:
        return (yield)
    finally:
        _running.pop()
