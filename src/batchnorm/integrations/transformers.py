"""Callbacks for transformers' Trainer: `Watch`, `Freeze` and `Recalibrate`.

from batchnorm.integrations.transformers import Freeze, Recalibrate, Watch

Trainer(..., callbacks=[Watch("runs/mine"), Recalibrate(batches=100)])
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from ..tools.freeze import freeze
from .recalibration import Recalibrator
from .recording import Recording

try:
    from transformers import TrainerCallback
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"this needs {error.name}: pip install 'batchnorm[transformers]'", name=error.name
    ) from None


class Watch(Recording, TrainerCallback):
    """Records the training with `batchnorm.watch`, from the first step to the last.

    On several ranks the first records. A training that goes on from a checkpoint goes on with the run in log_dir, if
    there is one. Transformers tells callbacks nothing of an exception: such a run ends as "interrupted", when the
    process does or the next training begins.

    Args:
        log_dir: a folder for the run; None for runs/<date>-<time>.
        options: as of `watch`: every, layers, meta, resume_step, vector_bytes, on_step.

    Attributes:
        recorder: of the training under way; None before and after.
    """

    def __init__(self, log_dir: Any = None, **options: Any) -> None:
        super().__init__(log_dir, options)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin the run."""
        self._close("interrupted")
        self._begin(kwargs["model"], kwargs["optimizer"], state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Keep what the trainer logs (loss, learning rate, metrics) with the run."""
        numbers = {name: value for name, value in (logs or {}).items() if isinstance(value, (int, float))}
        numbers.pop("step", None)
        if self.recorder and numbers:
            self.recorder.log(**numbers)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put what was recorded on disk."""
        self._flush()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End the run."""
        self._close("finished")


class Freeze(TrainerCallback):
    """Freezes the batch norms with `batchnorm.freeze` as the training begins; train() does not thaw them.

    Args:
        stats: keep the running statistics, and use them.
        affine: keep gamma and beta. The optimizer has them already, and passes over what has no gradient.
        part: what of the model to freeze, `lambda model: model.backbone`; None for all.
    """

    def __init__(
        self, stats: bool = True, affine: bool = False, part: Callable[[Any], nn.Module] | None = None
    ) -> None:
        self._stats, self._affine, self._part = stats, affine, part

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Freeze."""
        model = kwargs["model"]
        freeze(self._part(model) if self._part else model, stats=self._stats, affine=self._affine)


class Recalibrate(TrainerCallback):
    """Sets running statistics to those of the training data before each evaluation, each checkpoint, and at the end.

    Args:
        batches: how many batches of the training data to go over; None for all.
        data: batches to go over instead.
        call: `call(model, batch)` for a batch that is not keyword arguments of the model.
        options: as of `recalibrate`: exact, only, sync.
    """

    def __init__(
        self,
        batches: int | None = 100,
        *,
        data: Iterable[Any] | None = None,
        call: Callable[[Any, Any], Any] | None = None,
        **options: Any,
    ) -> None:
        self._recalibrate = Recalibrator(batches, data, call, options)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Recalibrate what is about to be evaluated or saved: the trainer has decided that before it asks callbacks."""
        if control.should_evaluate or control.should_save:
            self._recalibrate(kwargs["model"], kwargs["train_dataloader"])

    on_epoch_end = on_step_end

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Recalibrate what the training ends with."""
        self._recalibrate(kwargs["model"], kwargs["train_dataloader"])
