"""Recording a training: `watch` writes a run, `open_run` and `list_runs` read runs without torch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .recorder import Recorder as Recorder
    from .recorder import watch as watch
    from .run import Run as Run
    from .run import list_runs as list_runs
    from .run import open_run as open_run
    from .schema import COLUMNS as COLUMNS
    from .schema import QUANTITIES as QUANTITIES
    from .schema import LayerInfo as LayerInfo

_HOME = {
    "COLUMNS": "schema",
    "LayerInfo": "schema",
    "QUANTITIES": "schema",
    "Recorder": "recorder",
    "Run": "run",
    "list_runs": "run",
    "open_run": "run",
    "watch": "recorder",
}

__all__ = list(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
