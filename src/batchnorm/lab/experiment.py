"""The experiment: the arms one after another, from the same weights and with the same batches; run, killed, resumed."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import __version__
from ..runs import Run, open_run
from ..runs.files import write_atomically
from ..runs.lock import Lock
from ..runs.schema import FORMAT, RESULTS, RUN
from ..view.facts import plain
from .batches import Batches
from .data import Data, load
from .errors import LabError
from .models import CNN_CHANNELS
from .parallel import ranks
from .settings import Settings
from .training import CHECKPOINT_SECONDS, Tick, Training

# Below so many numbers in a batch's largest activation one thread computes: two would gain little, and on a busy
# machine, where each waits for the other at every operation, made a step of the default network 50 times slower.
_FEW_ACTIVATIONS = 1 << 22


class Experiment:
    """A folder in which the arms of one experiment are trained, each a run in the subfolder of its name.

    It holds the folder from the beginning to the end of `run`: no other process can resume it meanwhile. Of several
    ranks the first has the folder, and each of the others one in it, `rank-1` and so on, where it records.

    Args:
        path: the folder: a new or empty one for `begin`, an experiment's for `resume`.
        settings: what is asked for.
        data: what `settings.data` names.
        lock: of the folder; None where the experiment is finished, and nothing will be written.
    """

    def __init__(
        self,
        path: Path,
        settings: Settings,
        data: Data,
        created: str,
        threads: int,
        results: dict[str, Any],
        lock: Lock | None,
    ) -> None:
        self.path, self.settings, self.data, self.is_finished = path, settings, data, lock is None
        self._created, self._threads, self._results, self._lock = created, threads, results, lock

    @classmethod
    def begin(cls, settings: Settings, path: str | Path | None = None) -> Experiment:
        """A new experiment, its folder made and described.

        Args:
            settings: what is asked for.
            path: a folder that is new or empty; None for runs/<data>-<model>-<time>.
        Raises:
            LabError: the folder is in use, or the data cannot be read.
            BlockingIOError: another process begins one there at the same moment.
        """
        if ranks().rank > 0:
            return cls._follow()
        data = load(settings.data)
        now = datetime.now(timezone.utc)
        if path is None:
            name = Path(settings.data).name.split(".")[0]
            path = Path("runs") / f"{name}-{settings.model}-{datetime.now():%Y%m%d-%H%M%S}"
        path = Path(path)
        if path.exists() and not (path.is_dir() and next(path.iterdir(), None) is None):
            raise LabError(f"--out {path}: expected a new or empty folder; to continue a run use --resume {path}")
        path.mkdir(parents=True, exist_ok=True)
        created, threads = now.isoformat(timespec="seconds"), _threads(settings, data)
        experiment = cls(path, settings, data, created, threads, {}, Lock(path))
        experiment._describe("running")
        return experiment._led()

    @classmethod
    def resume(cls, path: str | Path, given: dict[str, Any] | None = None) -> Experiment:
        """The experiment in a folder, to go on with where its last checkpoint left it.

        Args:
            path: its folder.
            given: settings that the caller takes it to have, by name.
        Raises:
            LabError: no experiment there, a setting that differs from the run's, or data that has changed.
            BlockingIOError: another process is training it.
        """
        if ranks().rank > 0:
            return cls._follow()
        try:
            run = open_run(path)
        except (FileNotFoundError, ValueError) as error:
            raise LabError(f"--resume {path}: {error}") from None
        try:
            settings = Settings.from_meta(run.meta)
        except LabError as error:
            raise LabError(f"--resume {path}: {error}") from None
        for name, value in (given or {}).items():
            asked, there = (_shown(v) for v in (value, getattr(settings, name)))
            if asked != there:
                option = f"--{name.replace('_', '-')} {asked}"
                raise LabError(f"{option} contradicts {path}, which has {there}: drop the option, or begin a new run")
        if settings.processes != ranks().world:
            raise LabError(
                f"{path} is trained on {settings.processes} processes, not {ranks().world}; to continue: torchrun "
                f"--nproc-per-node {settings.processes} -m batchnorm train --sync --resume {path}"
            )
        data = load(settings.data)
        if run.meta.get("data_sha256") != data.sha256:
            raise LabError(f"{settings.data} has changed since {path} began: begin a new run")
        if run.meta.get("torch") != torch.__version__:
            began = run.meta.get("torch")
            warnings.warn(
                f"the run began with torch {began} and is resumed with {torch.__version__}: the bits may differ",
                stacklevel=2,
            )
        lock = None
        if run.status != "finished" or not set(settings.arms) <= set(run.results.get("arms", {})):
            lock = Lock(run.path)
            run = open_run(path)  # whoever held it until now may have ended an arm
        results = run.results.get("arms", {})
        return cls(run.path, settings, data, run.created, run.meta.get("threads", 1), results, lock)._led()

    def _led(self) -> Experiment:
        """This one, once the other ranks know what it is about."""
        facts = (str(self.path.resolve()), self.settings, self._created, self._threads, self._results, self.is_finished)
        ranks().of_first(facts)
        return self

    @classmethod
    def _follow(cls) -> Experiment:
        """The same experiment as the first rank's, on another rank: in a folder of its own."""
        facts: Any = ranks().of_first(None)
        path, settings, created, threads, results, is_finished = facts
        path = ranks().folder(Path(path))
        path.mkdir(exist_ok=True)
        lock = None if is_finished else Lock(path)
        return cls(path, settings, load(settings.data), created, threads, dict(results), lock)

    def run(
        self,
        on_step: Callable[[Tick], None] = lambda tick: None,
        checkpoint_seconds: float = CHECKPOINT_SECONDS,
    ) -> Run:
        """Train every arm that has no results yet, and return the finished run.

        Args:
            on_step: called after every step.
            checkpoint_seconds: least time between two checkpoints.
        Raises:
            LabError: a checkpoint is damaged; the run is as it was.
            KeyboardInterrupt: as it came, the run left readable and resumable.
            BlockingIOError: this is the second `run`, and another process has taken the folder since the first.
        """
        if self.is_finished:
            return open_run(self.path)
        lock, self._lock = self._lock or Lock(self.path), None
        try:
            # All at once: a damaged checkpoint is refused before anything is written.
            trainings = [
                Training(arm, self.data, self.settings, self.path / arm, checkpoint_seconds)
                for arm in self.settings.arms
                if arm not in self._results
            ]
        except BaseException:
            lock.release()
            raise
        threads = torch.get_num_threads()
        try:
            self._describe("running")
            torch.set_num_threads(self._threads)
            while trainings:
                training = trainings.pop(0)
                self._results[training.arm] = plain(training.run(on_step))  # JSON has no NaN
                self._write(RESULTS, {"arms": self._results})
            self._describe("finished")
            self.is_finished = True
        except BaseException as error:
            with suppress(OSError):  # the folder may have gone, the disk be full: what ended the training counts
                self._describe("interrupted" if isinstance(error, KeyboardInterrupt) else "failed")
            raise
        finally:
            torch.set_num_threads(threads)
            lock.release()
        return open_run(self.path)

    def first_batches(self) -> list[Tensor]:
        """The batches that the first epoch of every arm is cut into: numbers of samples."""
        return Batches(len(self.data.y_train), self.settings.batch_size, self.settings.seed, fixed=True).first

    def _describe(self, status: str) -> None:
        """Write run.json."""
        data, settings = self.data, self.settings
        meta = {
            **settings.to_meta(),
            "learns": settings.design.learns,
            "data_sha256": data.sha256,
            "train_samples": len(data.y_train),
            "test_samples": len(data.y_test),
            "sample_shape": list(data.shape),
            "classes": data.classes,
            "torch": torch.__version__,
            "threads": self._threads,
        }
        facts = {"format": FORMAT, "batchnorm": __version__, "created": self._created, "status": status}
        self._write(RUN, {**facts, "layers": [], "arms": list(settings.arms), "meta": meta})

    def _write(self, name: str, value: dict[str, Any]) -> None:
        write_atomically(self.path / name, json.dumps(value, indent=1, allow_nan=False).encode())


def _threads(settings: Settings, data: Data) -> int:
    """How many threads to compute with: kept in the run, because the last bit of a sum can depend on it."""
    width = CNN_CHANNELS[0] if settings.model == "cnn" else 1
    few = settings.batch_size * math.prod(data.shape) * width < _FEW_ACTIVATIONS
    return 1 if few else torch.get_num_threads()


def _shown(value: Any) -> str:
    return ",".join(value) if isinstance(value, tuple) else str(value)
