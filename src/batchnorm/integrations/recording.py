"""What the `Watch` callbacks share: a recorder that begins, goes on from a checkpoint, and ends with a training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..runs.schema import RUN
from ..watch import Recorder, watch


class Recording:
    """A training's recorder.

    Attributes:
        recorder: of the training under way; None before and after.
    """

    def __init__(self, log_dir: Any, options: dict[str, Any]) -> None:
        self._log_dir, self._options = log_dir, options
        self.recorder: Recorder | None = None

    def _begin(self, model: Any, optimizer: Any, step: int, **options: Any) -> None:
        """Begin the run; one that is there is gone on with where the training goes on from a checkpoint."""
        if step and self._log_dir is not None and (Path(self._log_dir) / RUN).exists():
            options["resume_step"] = step
        self.recorder = watch(model, self._log_dir, optimizer=optimizer, **{**options, **self._options})

    def _flush(self) -> None:
        """Put what was recorded on disk before a checkpoint is: a training that goes on from that has no gap."""
        if self.recorder:
            self.recorder.flush()

    def _close(self, status: str) -> None:
        recorder, self.recorder = self.recorder, None
        if recorder:
            recorder.close(status)
