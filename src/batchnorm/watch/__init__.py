"""The recorder: `watch` records what a model's batch-norm layers measure, track and learn, in a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._lazy import face

if TYPE_CHECKING:
    from .recorder import Recorder as Recorder
    from .recorder import watch as watch

_HOME = {"Recorder": ".recorder", "watch": ".recorder"}

__all__ = face(__name__, _HOME)  # pyright: ignore[reportUnsupportedDunderAll]
