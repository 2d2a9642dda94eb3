"""watch(): record what a model's batch-norm layers measure, track and learn, while it trains."""

from __future__ import annotations

import atexit
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ..model.find import bare
from ..runs.folder import create_folder, reopen_folder, set_status
from ..runs.journal import HEADER
from ..runs.lines import Lines, to_jsonable
from ..runs.lock import Lock
from ..runs.schema import F4, QUANTITIES, SCALARS, LayerInfo, vector_starts
from .capture import Capture
from .hooks import Hook
from .layers import choose
from .probe import probe
from .schedule import Schedule
from .snapshot import Snapshot
from .writer import Writer


def watch(
    model: nn.Module,
    log_dir: str | os.PathLike[str] | None = None,
    *,
    optimizer: Optimizer | None = None,
    every: int = 1,
    layers: Sequence[str] | None = None,
    meta: Mapping[str, Any] | None = None,
    resume_step: int | None = None,
    vector_bytes: int = 128 << 20,
    every_rank: bool = False,
) -> Recorder:
    """Record what the model's batch-norm layers measure, track and learn: a context manager, and the handle of the run.

    Works on any model with torch.nn's batch-norm layers or subclasses of them. The training computes the same bits with
    and without it. A step is one `optimizer.step()`, or, without an optimizer, one forward of the model in train mode.

    Args:
        model: what is called in the training loop, wrapped (compiled, DistributedDataParallel) or not.
        log_dir: a new folder for the run; None for runs/<date>-<time>.
        optimizer: whose steps are counted, and whose gradients are read as it is about to use them. A model that is
            compiled from within, by model.compile() or after this, needs it.
        every: record every so manieth step.
        layers: names of the layers to watch, or patterns such as "encoder.*"; None for all, [] for none (`log` only).
        meta: anything JSON can hold, kept in run.json.
        resume_step: go on in an existing log_dir as if the steps from this one on had never been taken.
        vector_bytes: budget of the file of whole vectors; 0 keeps none.
        every_rank: in a process group, record on every rank, each in a log_dir of its own; else on the first alone.

    Returns:
        The recorder: `with watch(...) as w`, then `w.log`, `w.probe`, `w.step`, `w.path`.

    Raises:
        TypeError: `model` is no torch.nn.Module, or `optimizer` no torch.optim.Optimizer.
        ValueError: an optimizer that owns none of the model's parameters; no batch-norm layer, or none of a name in
            `layers`; a lazy layer that has not seen a batch;
            a model compiled in place without an optimizer; `resume_step` on a run of other layers.
        FileExistsError: log_dir is a file, or holds a run already and `resume_step` is None.
        FileNotFoundError: `resume_step` is given, and log_dir holds no run.
        BlockingIOError: another recorder, of this process or another, is writing to log_dir.

    Example:
        >>> import tempfile, torch
        >>> import batchnorm as bn
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 1))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> folder = tempfile.mkdtemp() + "/run"
        >>> with bn.watch(model, folder, optimizer=optimizer) as w:
        ...     for _ in range(5):
        ...         loss = model(torch.randn(8, 4)).square().mean()
        ...         optimizer.zero_grad()
        ...         loss.backward()
        ...         optimizer.step()
        ...         w.log(loss=loss)
        >>> run = bn.open_run(folder)
        >>> run.status, run.steps.tolist(), run.vectors("1", "gamma")[1].shape
        ('finished', [0, 1, 2, 3, 4], (5, 3))
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}: watch(model, log_dir)")
    if every < 1:
        raise ValueError(f"every must be at least 1, got {every}")
    if optimizer is not None and not hasattr(optimizer, "register_step_pre_hook"):
        raise TypeError(
            f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}; "
            "give the one inside, if it is a wrapper"
        )
    if optimizer is None and getattr(model, "_compiled_call_impl", None) is not None:
        raise ValueError(
            "a model compiled in place, by model.compile(), calls no hooks: give optimizer= to count its steps"
        )
    chosen = choose(model, layers)
    infos = [info for info, _ in chosen]
    if optimizer is not None and not _moves(optimizer, model):
        raise ValueError(
            "optimizer must own a parameter of the model, and owns none: its steps would not be the model's; give the "
            "one made from model.parameters(), or leave it out"
        )
    if _rank() != 0 and not every_rank:  # parameters and their gradients are the same on every rank: one writes
        lock = None
    elif resume_step is None:
        lock = create_folder(log_dir, infos, meta, {"torch": torch.__version__, "every": every})
    else:
        lock = reopen_folder(log_dir, infos, meta)
    frame_bytes = int(vector_starts(infos, len(QUANTITIES))[-1]) * F4.itemsize + HEADER.size
    schedule = Schedule.within(vector_bytes, frame_bytes)
    writer = Writer(lock.path, infos, schedule, every, resume_step) if lock else None
    return Recorder(model, chosen, optimizer, every, lock, writer, resume_step or 0)


class Recorder:
    """The handle of a run that is being recorded; made by `watch`.

    Attributes:
        path: the run's folder; None on ranks other than 0 of a process group, which record nothing.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[tuple[LayerInfo, nn.Module]],
        optimizer: Optimizer | None,
        every: int,
        lock: Lock | None,
        writer: Writer | None,
        first_step: int,
    ) -> None:
        self.path: Path | None = lock.path if lock else None
        self._lock = lock
        self._model = bare(model)
        self._layers = layers
        self._every = every
        self._next = first_step  # the step to come, or under way
        self._current = max(0, first_step - 1)  # the step that a logged number belongs to
        self._writer = writer
        self._scalars = Lines(lock.path / SCALARS, first_step) if lock else None
        self._pending: Snapshot | None = None  # without an optimizer: the last step, until its gradients are there
        self._closed = False
        self._process = os.getpid()
        parameter = next(model.parameters(), None)
        self._capture = Capture(layers if writer else [], parameter.device if parameter is not None else None)
        self._capture.begin(self._is_recorded(first_step))
        self._submit(self._capture.take(first_step, recorded=False, gradients=False))
        self._handles = [model.register_forward_pre_hook(Hook(self._on_forward))]
        if optimizer is not None:
            self._handles.append(optimizer.register_step_pre_hook(self._on_step))
        else:
            self._handles.append(model.register_forward_hook(Hook(self._on_forwarded)))
            self._handles.append(register_optimizer_step_pre_hook(self._on_any_step))
        self._counts_optimizer_steps = optimizer is not None
        atexit.register(self.close, "interrupted")

    @property
    def step(self) -> int:
        """The number of steps taken, which is the number of the step to come."""
        return self._next

    def log(self, **numbers: Any) -> None:
        """Append numbers to the run's scalars, at the step under way or, between steps, at the last one taken.

        Args:
            numbers: Python's, NumPy's or torch's single numbers. NaN and infinities are kept.

        Raises:
            TypeError: a value is not one number. ValueError: the recorder is closed, or a name is "step".
        """
        if self._closed:
            raise ValueError("cannot log: the recorder is closed")
        if "step" in numbers:
            raise ValueError('a logged number cannot be called "step": the recorder counts the steps')
        if self._scalars:
            values = {name: to_jsonable(number) for name, number in numbers.items()}
            self._scalars.append([{"step": self._current, **values}])

    def probe(self, batches: Iterable[Any], call: Callable[[nn.Module, Any], Any] | None = None) -> None:
        """Record what several batches measure at the weights as they are now.

        The model runs in train mode, without gradients, and is left as it was: buffers, flags, gradients, random state.

        Args:
            batches: tensors, tuples that begin with the input, or dicts of keyword arguments.
            call: runs a model on a batch; by default model(x), or model(**batch) of a dict.
        """
        if self._closed:
            raise ValueError("cannot probe: the recorder is closed")
        self._capture.switch.paused = True
        try:
            values = probe(self._model, self._layers, batches, call)
        finally:
            self._capture.switch.paused = False
        if self._layers:
            self._submit((self._current, values))

    def flush(self) -> None:
        """Wait until all that was recorded is with the operating system: call it before writing a checkpoint.

        Then a process killed after the checkpoint, and resumed from it, has lost no record of an earlier step.
        """
        if self._writer:
            self._writer.flush()

    def close(self, status: str = "finished") -> None:
        """Write what is left, take all hooks out of the model and the optimizer, and end the run with this status."""
        if self._closed or os.getpid() != self._process:  # the run of a forked child is its parent's
            return
        self._closed = True
        atexit.unregister(self.close)
        for handle in self._handles:
            handle.remove()
        self._finish_pending()
        self._capture.remove()
        if self._writer:
            self._writer.close()
            self._warn()
        if self._scalars:
            self._scalars.close()
        if self._lock:
            try:
                set_status(self._lock.path, status)
            finally:
                self._lock.release()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.close("finished")
        else:
            self.close("interrupted" if issubclass(kind, KeyboardInterrupt) else "failed")

    def _is_recorded(self, step: int) -> bool:
        return bool(self._layers) and self._writer is not None and step % self._every == 0

    def _on_forward(self, model: nn.Module, args: Any) -> None:
        """A forward of the model begins: what is logged from here on belongs to the step to come."""
        if not model.training or self._capture.switch.paused:
            return
        self._current = self._next
        if not self._counts_optimizer_steps:
            self._finish_pending()
            self._capture.begin(self._is_recorded(self._next))

    def _on_forwarded(self, model: nn.Module, args: Any, output: Any) -> None:
        """Without an optimizer: a step's forward is over, its gradients are to come."""
        if model.training and not self._capture.switch.paused:
            self._pending = self._take(gradients=False)
            self._next += 1

    def _on_any_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Without an optimizer: some optimizer steps. If it moves what is watched, it is time to read the gradients."""
        if self._pending and any(self._capture.owns(p) for group in optimizer.param_groups for p in group["params"]):
            self._finish_pending()

    def _on_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """The optimizer is about to step: all of the step is there, and gamma and beta have not moved yet."""
        # An optimizer that takes the scaler's factor into its own step sees scaled gradients, and the factor.
        snapshot = self._take(scale=getattr(optimizer, "grad_scale", None))
        if snapshot:
            self._submit(snapshot)
        self._current = self._next
        self._next += 1
        self._capture.begin(self._is_recorded(self._next))

    def _take(self, **options: Any) -> Snapshot | None:
        """The step to come as a snapshot, if it is recorded or the next one needs to know where it began."""
        step = self._next
        if self._is_recorded(step):
            return self._capture.take(step, **options)
        if self._is_recorded(step + 1) and self._capture.unseen():
            self._submit(self._capture.take(step, recorded=False, gradients=False))
        return None

    def _finish_pending(self) -> None:
        if self._pending:
            self._capture.add_gradients(self._pending)
            self._submit(self._pending)
            self._pending = None

    def _submit(self, item: Snapshot | tuple[int, Any]) -> None:
        if self._writer and not self._warn():
            self._writer.submit(item)

    def _warn(self) -> bool:
        """Whether writing has failed; says so once."""
        if self._writer is None or self._writer.error is None:
            return False
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"recording to {self.path} stopped, the training goes on: {self._writer.error!r}", RuntimeWarning, 2
            )
        return True

    _warned = False


def _moves(optimizer: Optimizer, model: nn.Module) -> bool:
    own = {id(parameter) for parameter in model.parameters()}
    return any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"])


def _rank() -> int:
    distributed = torch.distributed
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0
