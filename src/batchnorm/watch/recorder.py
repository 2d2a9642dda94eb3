"""watch(): record what a model's batch-norm layers measure, track and learn, while it trains."""

from __future__ import annotations

import atexit
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import wraps
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from ..model.find import bare
from ..runs.folder import create_folder, end_folder, reopen_folder
from ..runs.journal import HEADER
from ..runs.lines import Lines, to_jsonable
from ..runs.lock import Lock
from ..runs.schema import F4, HISTOGRAMS, PROBES, QUANTITIES, SCALARS, LayerInfo, vector_starts
from .capture import Capture
from .layers import choose
from .probe import probe
from .schedule import MEASURED_SHARE, EveryKth, Plan, Schedule, WithinShare
from .snapshot import Extra, Snapshot
from .steps import Steps, holds, innermost
from .updates import Updates
from .writer import Writer


def watch(
    model: nn.Module,
    log_dir: str | os.PathLike[str] | None = None,
    *,
    optimizer: Optimizer | None = None,
    every: int | Literal["auto"] = 1,
    layers: Sequence[str] | None = None,
    meta: Mapping[str, Any] | None = None,
    resume_step: int | None = None,
    vector_bytes: int = 128 << 20,
    every_rank: bool = False,
    on_step: Callable[[dict[str, float]], object] | None = None,
) -> Recorder:
    """Record what the model's batch-norm layers measure, track and learn: a context manager, and the handle of the run.

    Works on any model with torch.nn's batch-norm layers or subclasses of them. The training computes the same bits with
    and without recording. A step is one `optimizer.step()`. Without `optimizer`, a step ends when any optimizer that
    holds a parameter of the model steps, or when model(x) is called again. This also works in loops that call
    model.loss(x) or a training_step(x), and in loops that step without torch.optim.

    Args:
        model: the model that is trained, wrapped (compiled, DistributedDataParallel) or not.
        log_dir: a new folder for the run; None for runs/<date>-<time>.
        optimizer: its steps are counted, and gradients are read as it is about to use them. A wrapper with an attribute
            `optimizer` works too. Pass it if a step has several forwards of the model (gradient accumulation).
        every: record every `every`-th step; "auto": as many steps as cost at most 1 % of the training's time.
        layers: names of the layers to watch, or patterns such as "encoder.*"; None for all, [] for none (`log` only).
        meta: any JSON value, stored in run.json.
        resume_step: continue the run in an existing log_dir at this step; its records from this step on are discarded.
        vector_bytes: size limit of the file of whole vectors; 0 keeps no whole vectors and no worked steps.
        every_rank: in a process group, record on every rank, each in its own log_dir; else only on the first.
        on_step: called with each record as a plain dict, {"step": 3, "bn/<layer>/gamma_mean": 1.0, ...}, for a logger;
            called in the training's thread, some steps later, once the record is on disk. Its exceptions become
            warnings.

    Returns:
        The recorder: `with watch(...) as w`, then `w.log`, `w.probe`, `w.step`, `w.path`.

    Raises:
        TypeError: `model` is not a torch.nn.Module, or `optimizer` is not a torch.optim.Optimizer.
        ValueError: an optimizer that owns none of the model's parameters; no batch-norm layer, or none that matches an
            entry of `layers`; a lazy layer that has not seen a batch; a sharded layer; `resume_step` on a run with
            different layers.
        FileExistsError: log_dir is a file, or holds a run already and `resume_step` is None; or a file of the run is a
            link.
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
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}; call watch(model, log_dir)")
    if every != "auto" and not (isinstance(every, int) and every >= 1):
        raise ValueError(f'every must be at least 1, or "auto", got {every!r}')
    if on_step is not None and not callable(on_step):
        raise TypeError(f"on_step must be callable with a dict, got {type(on_step).__name__}")
    optimizer = innermost(optimizer)
    if optimizer is not None and not hasattr(optimizer, "register_step_pre_hook"):
        raise TypeError(
            f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}; "
            "give the one inside, if it is a wrapper"
        )
    chosen = choose(model, layers)
    infos = [info for info, _ in chosen]
    if optimizer is not None and not holds(optimizer, set(model.parameters())):
        raise ValueError(
            "optimizer must own a parameter of the model, but owns none, so its steps are not the model's; pass the "
            "one made from model.parameters(), or leave it out"
        )
    if _rank() != 0 and not every_rank:  # parameters and gradients are the same on every rank, so one rank writes
        lock = None
    elif resume_step is None:
        lock = create_folder(log_dir, infos, meta, {"torch": torch.__version__, "every": every})
    else:
        lock = reopen_folder(log_dir, infos, meta)
    frame_bytes = int(vector_starts(infos, len(QUANTITIES))[-1]) * F4.itemsize + HEADER.size
    schedule = Schedule.within(vector_bytes, frame_bytes)
    writer = Writer(lock.path, infos, schedule, resume_step, on_step is not None) if lock else None
    updates = Updates(chosen, wanted=vector_bytes > 0)
    return Recorder(model, chosen, optimizer, every, lock, writer, updates, resume_step or 0, on_step)


def _timed(method: Callable[..., None]) -> Callable[..., None]:
    """Wrap the method so that its time counts as recording time."""

    @wraps(method)
    def timed(self: Recorder, *args: Any) -> None:
        begin = perf_counter()
        try:
            method(self, *args)
        finally:
            self._seconds += perf_counter() - begin

    return timed


def _guarded(method: Callable[..., None]) -> Callable[..., None]:
    """Wrap the method so that its failure ends the recording, never the training."""

    @wraps(method)
    def guarded(self: Recorder, *args: Any) -> None:
        try:
            method(self, *args)
        except Exception as error:
            self._stop(error)

    return guarded


class Recorder:
    """The handle of a run that is being recorded; made by `watch`.

    If anything fails in recording, it stops with one RuntimeWarning, and the training continues. A forked process
    records nothing, because the run belongs to its parent.

    Attributes:
        path: the run's folder, absolute; None on ranks other than 0 of a process group, which record nothing.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[tuple[LayerInfo, nn.Module]],
        optimizer: Optimizer | None,
        every: int | Literal["auto"],
        lock: Lock | None,
        writer: Writer | None,
        updates: Updates,
        first_step: int,
        on_step: Callable[[dict[str, float]], object] | None,
    ) -> None:
        self.path: Path | None = lock.path if lock else None
        self._lock = lock
        self._model = bare(model)
        self._layers = layers
        self._first = self._next = first_step  # the step to come, or under way
        self._writer = writer
        self._updates = updates
        self._on_step = on_step
        self._scalars = Lines(lock.path / SCALARS, first_step) if lock else None
        self._snapshot: Snapshot | None = None  # of the step under way, once its forward is over
        self._worked: Extra | None = None  # the step under way, whole, if it was chosen and is taken
        self._index: int | None = None  # of the record of the step under way, if it is recorded
        self._probes = 0
        self._begin = perf_counter()
        self._seconds = 0.0  # that the training's thread has spent here, but for the hooks of layers
        self._warned: set[str] = set()
        self._unsaid: list[str] = []  # warnings that wait for the end of `close`
        self._stopped = self._closed = False
        self._process = os.getpid()
        self._plan: Plan = (
            WithinShare(MEASURED_SHARE, writer.records if writer else 0, self._spent)
            if every == "auto"
            else EveryKth(every)
        )
        parameter = next(model.parameters(), None)
        self._capture = Capture(
            layers if writer else [],
            parameter.device if parameter is not None else None,
            self._plan.comes_off,
            tells=optimizer is None or self._plan.comes_off,
        )
        self._submit(self._capture.take(first_step, index=None, gradients=False))
        self._begin_step(True)
        self._steps = Steps(model, optimizer, self, hears_calls=not self._plan.comes_off)
        atexit.register(self.close, "interrupted")

    @property
    def step(self) -> int:
        """The number of steps taken, which is the number of the step to come."""
        return self._next + self._steps.is_past

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
            self._append({"step": self._current, **values})

    @_guarded
    def _append(self, row: dict[str, Any]) -> None:
        if self._scalars and self._goes_on():
            self._scalars.append([row])

    @property
    def _current(self) -> int:
        """The step under way or, between steps, the last one taken."""
        return self._next if self._steps.is_under_way else max(0, self._next - 1)

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
            values, histograms = probe(self._model, self._layers, batches, call)
        finally:
            self._capture.switch.paused = False
        if self._layers:
            self._probes += 1
            self._submit(Extra(self._current, lambda: {PROBES: values.tobytes(), HISTOGRAMS: histograms}))

    def flush(self) -> None:
        """Wait until the operating system has all records; call it before writing a checkpoint.

        A process that is killed after the checkpoint and resumed from it has then lost no earlier record.
        """
        if self._writer:
            self._writer.flush()

    def close(self, status: str = "finished") -> None:
        """Write the remaining records, remove all hooks from model and optimizer, and end the run with this status.

        If something cannot be written, warn that the recording stopped.
        """
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self.close)
        self._stopped = self._stopped or self._is_forked
        try:
            self._steps.close()
            self._capture.remove()
            if not self._is_forked:
                self._close_files()
                self._mark(status)
        finally:
            if self._lock:
                self._lock.release()
        self._say()

    @_guarded
    def _close_files(self) -> None:
        if self._writer:
            self._writer.close()
            self._goes_on()
            self._report()
        if self._scalars:
            self._scalars.close()

    @_guarded
    def _mark(self, status: str) -> None:
        """Say in the run how it ended."""
        if self._lock:
            end_folder(self._lock.path, status, self._recorded())
        if status == "finished" and self._layers and self._writer and not self._next and not self._probes:
            self._warn("no step", f"no step was recorded in {self.path}: {self._steps.why_none}")

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.close("finished")
        else:
            with suppress(RuntimeWarning):  # where warnings are errors: the training's own exception is what counts
                self.close("interrupted" if issubclass(kind, KeyboardInterrupt) else "failed")

    # What `Steps` tells.

    def is_listening(self) -> bool:
        return not self._capture.switch.paused

    def ran(self) -> bool:
        return self._capture.ran()

    def may_have_run(self) -> bool:
        return self._capture.is_blind or self._capture.ran()

    @_timed
    @_guarded
    def take(self, optimizer: Optimizer | None) -> None:
        self._snapshot = None
        if self._index is not None:
            scale = _scale(optimizer)
            self._updates.before(self._next, self._index, optimizer, scale)
            self._snapshot = self._capture.take(
                self._next, index=self._index, gradients=optimizer is not None, scale=scale
            )

    @_timed
    @_guarded
    def add_gradients(self, optimizer: Optimizer | None) -> None:
        if self._snapshot and self._index is not None:
            self._updates.before(self._next, self._index, optimizer, _scale(optimizer))
            self._capture.add_gradients(self._snapshot, _scale(optimizer))

    @_timed
    @_guarded
    def moved(self, optimizer: Optimizer) -> None:
        self._worked = self._updates.after(optimizer)

    @_timed
    def end(self, evaluations: int) -> None:
        stands = self._snapshot is not None and evaluations < 2
        self._finish_step()
        self._snapshot = self._worked = None
        self._updates.forget()
        self._next += 1  # even if nothing is recorded any more: the training may count by `step`
        self._begin_step(stands)
        self._report()

    @_guarded
    def _finish_step(self) -> None:
        if self._snapshot:
            self._snapshot.forwards = self._capture.forwards()  # a closure's later evaluations too
            self._submit(self._snapshot)
        if self._worked:
            self._submit(self._worked)

    @_guarded
    def _begin_step(self, stands: bool) -> None:
        """A step begins; `stands`: it is known where the running statistics stand."""
        goes_on = self._layers and self._writer and self._goes_on()
        self._index = self._plan.index(self._next) if goes_on else None
        unseen = self._index is not None and not stands and self._capture.unseen()
        self._capture.begin(self._index is not None)
        if unseen:  # only from how they move can be told what the step will have measured
            self._submit(self._capture.take(self._next, index=None, gradients=False))

    def _spent(self) -> float:
        """The seconds that recording has cost so far, in this thread and in the writer's."""
        return self._seconds + self._capture.switch.seconds + (self._writer.cpu_seconds if self._writer else 0.0)

    def _recorded(self) -> dict[str, Any]:
        """What run.json says of the recording."""
        facts: dict[str, Any] = {"steps": self._next, "records": self._writer.records if self._writer else 0}
        if self._next > self._first:
            facts["share_of_time"] = round(self._spent() / (perf_counter() - self._begin), 4)
        return facts

    def _report(self) -> None:
        """Hand the records written since to `on_step`."""
        while self._on_step and self._writer and self._writer.reports and not self._is_forked:
            numbers = self._writer.reports.popleft()
            try:
                self._on_step(numbers)
            except Exception as error:  # a logger that is out of order is no reason to end a training
                self._warn("on_step", f"on_step raised, the training goes on: {error!r}")

    def _submit(self, item: Snapshot | Extra) -> None:
        if self._writer and self._goes_on():
            self._writer.submit(item)

    @property
    def _is_forked(self) -> bool:
        """Whether this process is a child of the one that records: it has neither the writer's thread nor the lock."""
        return os.getpid() != self._process

    def _goes_on(self) -> bool:
        """Whether recording goes on; says once what has stopped it."""
        if self._stopped:
            return False
        error = self._capture.switch.error or (self._writer.error if self._writer else None)
        if self._is_forked:
            self._stopped = True
            self._warn("stopped", f"a forked process records nothing: the run {self.path} belongs to its parent")
        elif error:
            self._stop(error)
        return not self._stopped

    def _stop(self, error: BaseException) -> None:
        self._stopped = True
        self._warn("stopped", f"recording to {self.path} stopped, the training goes on: {error!r}")

    def _warn(self, what: str, message: str) -> None:
        """Warn, of each matter once; while closing, at its end, for a warning may be made an error."""
        if what not in self._warned:
            self._warned.add(what)
            self._unsaid.append(message)
            if not self._closed:
                self._say()

    def _say(self) -> None:
        while self._unsaid:
            warnings.warn(self._unsaid.pop(0), RuntimeWarning, 4)


def _scale(optimizer: Optimizer | None) -> Any:
    """What a gradient scaler has multiplied by, where the optimizer takes that into its own step."""
    return getattr(optimizer, "grad_scale", None)


def _rank() -> int:
    distributed = torch.distributed
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0
