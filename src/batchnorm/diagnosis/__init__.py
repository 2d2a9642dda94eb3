"""Finding what is wrong with a model's batch normalization, from a run, a checkpoint, the model, or by running it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._lazy import face

if TYPE_CHECKING:
    from .finding import Finding as Finding
    from .findings import Findings as Findings
    from .judge import diagnose as diagnose
    from .modes import Comparison as Comparison
    from .modes import compare_modes as compare_modes

_HOME = {
    "Comparison": ".modes",
    "compare_modes": ".modes",
    "Finding": ".finding",
    "Findings": ".findings",
    "diagnose": ".judge",
}

__all__ = face(__name__, _HOME)  # pyright: ignore[reportUnsupportedDunderAll]
