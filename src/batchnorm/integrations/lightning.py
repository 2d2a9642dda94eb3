"""Callbacks for Lightning's Trainer: `Watch`, `Freeze` and `Recalibrate`.

    from batchnorm.integrations.lightning import Freeze, Recalibrate, Watch

    Trainer(callbacks=[Watch("runs/mine"), Recalibrate(batches=100)])

They work with `lightning` and with `pytorch_lightning`: with the one that is imported already, else with whichever is
there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from importlib import import_module
from typing import TYPE_CHECKING, Any

from torch import nn

from ..tools.freeze import freeze
from .recalibration import Recalibrator
from .recording import Recording

if TYPE_CHECKING:
    from lightning.pytorch import Callback
else:
    _NAMES = ("lightning.pytorch", "pytorch_lightning")
    try:
        Callback = import_module(next((name for name in _NAMES if name in sys.modules), _NAMES[0])).Callback
    except ModuleNotFoundError:
        try:
            Callback = import_module(_NAMES[1]).Callback
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"this needs {error.name}: pip install 'batchnorm[lightning]'", name=error.name
            ) from None


class Watch(Recording, Callback):
    """Records the training with `batchnorm.watch`, from the first step of a fit to its end.

    A step is one optimizer.step(): of the one optimizer, or of any of several. On several ranks the first records.
    A fit that goes on from a checkpoint goes on with the run in log_dir, if there is one.

    Args:
        log_dir: a folder for the run; None for runs/<date>-<time>.
        log: also send every record to the trainer's loggers, as on_step of `watch` would have it.
        options: as of `watch`: every, layers, meta, resume_step, vector_bytes.

    Attributes:
        recorder: of the fit under way; None before and after.
    """

    def __init__(self, log_dir: Any = None, *, log: bool = False, **options: Any) -> None:
        super().__init__(log_dir, options)
        self._log = log

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin the run, when optimizers and parameters are what is trained."""

        def to_loggers(numbers: dict[str, float]) -> None:
            step = numbers.pop("step")
            for logger in trainer.loggers:
                logger.log_metrics(numbers, step=int(step))

        options = {"on_step": to_loggers} if self._log else {}
        optimizer = trainer.optimizers[0] if len(trainer.optimizers) == 1 else None
        self._begin(pl_module, optimizer, trainer.global_step, **options)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """End the run."""
        self._close("finished")

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """End the run as what it is."""
        self._close("interrupted" if isinstance(exception, KeyboardInterrupt) else "failed")

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Put what was recorded on disk."""
        self._flush()


class Freeze(Callback):
    """Freezes the batch norms with `batchnorm.freeze` before the optimizers are made; train() does not thaw them.

    Args:
        stats: keep the running statistics, and use them.
        affine: keep gamma and beta.
        part: what of the module to freeze, `lambda module: module.backbone`; None for all.
    """

    def __init__(
        self, stats: bool = True, affine: bool = False, part: Callable[[Any], nn.Module] | None = None
    ) -> None:
        self._stats, self._affine, self._part = stats, affine, part

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Freeze, before any optimizer or wrapper looks at the parameters."""
        if stage == "fit":
            freeze(self._part(pl_module) if self._part else pl_module, stats=self._stats, affine=self._affine)


class Recalibrate(Callback):
    """Sets running statistics to those of the training data before each validation, each checkpoint, and at the end.

    For averaged weights (WeightAveraging, EMAWeightAveraging, StochasticWeightAveraging), whose running statistics are
    those of other weights, and wherever running statistics lag behind. It comes after such a callback in the trainer's
    list: then the averaged weights are what is recalibrated. The training itself stays on the same bits.

    Args:
        batches: how many batches of the training data to go over; None for all.
        data: batches to go over instead.
        call: `call(module, batch)` for a batch that is not (x, ...) or keyword arguments of the module's forward.
        options: as of `recalibrate`: exact, only, sync.

    Checkpoints with save_weights_only=True hold what the last validation had: Lightning calls no callback for them.
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

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Raise a ValueError where an averaging callback would come after this one."""
        after = trainer.callbacks[trainer.callbacks.index(self) + 1 :]
        averaging = [type(each).__name__ for each in after if "WeightAveraging" in str(type(each).__mro__)]
        if averaging:
            raise ValueError(f"Recalibrate must come after {averaging[0]} in callbacks, or it would see other weights")

    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Recalibrate what is about to be validated: the averaged weights, where an average has taken their place."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._recalibrate(pl_module, trainer.train_dataloader)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Recalibrate what the training ends with."""
        self._recalibrate(pl_module, trainer.train_dataloader)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Recalibrate what is in the checkpoint, which is not on disk yet."""
        if trainer.state.fn == "fit":
            self._recalibrate.state(pl_module, trainer.train_dataloader, checkpoint["state_dict"])
