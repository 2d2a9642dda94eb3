"""Showing a run: the page, its charts, the terminal. Nothing here imports torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._lazy import face

if TYPE_CHECKING:
    from .picture import main_chart as main_chart

_HOME = {"main_chart": ".picture"}

__all__ = face(__name__, _HOME)  # pyright: ignore[reportUnsupportedDunderAll]
