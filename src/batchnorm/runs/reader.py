"""Reading a run: everything that `watch` wrote, as NumPy arrays, without torch."""

from __future__ import annotations

import os
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypedDict

import numpy as np
from msgspec import Meta

from .._lazy import late
from .frame import to_frame
from .histogram import batch_bytes, decode, is_valid, kept_channels
from .journal import Frames
from .lock import LOCK, is_held
from .parse import parse, read_regular, typed
from .schema import (
    ALERTS,
    F4,
    FORMAT,
    HISTOGRAMS,
    MOST_CHANNELS,
    OPTIMIZERS,
    PROBED,
    PROBES,
    QUANTITIES,
    RESULTS,
    RUN,
    SCALARS,
    STATS,
    UPDATES,
    VECTORS,
    Results,
    RunFacts,
    stats_dtype,
    vector_starts,
)
from .sources import Columns, Files, Whole, fault_of
from .update import Update, Updates, payload_bytes

if TYPE_CHECKING:
    from ..view.plots import Plots

# A table of probes has room for the largest number of batches in each.
MOST_PADDED, LEAST_TABLE = 16, 1 << 26  # times the bytes of the probes themselves; bytes


class _Format(TypedDict):
    """What every later format says too."""

    format: Annotated[int, Meta(ge=1)]


class Run:
    """One recorded training (or, with `arms`, an experiment of several), read when first asked for.

    Attributes:
        path: its folder.
        status: "running", "finished", "interrupted" or "failed", as it was opened. A killed run is "interrupted": its
            lock is free. (Where there are no such locks, on Windows, it stays "running".)
        created: when it began, ISO 8601, UTC.
        meta: what the program that recorded it had to say, free JSON.
        layers: the watched layers, in model order.
        recorded: once the recorder was closed: "steps" taken, "records" of them, and "share_of_time", what recording
            them cost of the training's time, in its own thread and the writer's.
    """

    def __init__(self, path: Path, facts: RunFacts, files: Files | None = None) -> None:
        self.path = path
        self._files = files or Whole(path, _try_open)
        self.status = facts.status
        if self.status == "running" and fault_of(path / LOCK) is None and is_held(path) is False:
            self.status = "interrupted"
        self.created = facts.created
        self.meta = facts.meta or {}
        self.layers = facts.layers or []
        self.recorded = facts.recorded or {}
        self._index = {layer.name: i for i, layer in enumerate(self.layers)}
        self._arm_names = facts.arms or []

    def __repr__(self) -> str:
        arms = f", arms={self._arm_names}" if self._arm_names else ""
        return f"Run({str(self.path)!r}, status={self.status!r}, layers={len(self.layers)}{arms})"

    def _repr_html_(self) -> str:
        return late("..view.notebook", "run_html", __package__)(self)

    @property
    def plot(self) -> Plots:
        """The charts of the page, for a notebook: `run.plot.learned("bn1")` and others, see `Plots`."""
        return late("..view.plots", "Plots", __package__)(self)

    to_frame = to_frame

    @property
    def steps(self) -> np.ndarray:
        """The recorded steps, (T,) int64, ascending."""
        return self._stats.steps

    def stats(self, layer: str, quantity: str) -> np.ndarray:
        """What a quantity was over a layer's channels: (T, 9) float32, columns `COLUMNS`, a row a recorded step.

        Args:
            layer: a name from `layers`.
            quantity: one of `QUANTITIES`. batch_var is the biased variance, the one that normalization uses.
        Returns:
            min, 5 %, 25 %, 50 %, 75 %, 95 %, max and mean of the finite values, and how many were not finite. A
            row of NaN where the quantity did not exist at that step.
        Raises:
            KeyError: no such layer or quantity.
        """
        return self._records["stats"][:, self._layer(layer), _quantity(quantity, QUANTITIES)]

    def nonfinite(self, layer: str) -> np.ndarray:
        """How many values were not finite: (T, 8) float32, columns `QUANTITIES`; NaN where a quantity did not exist."""
        return self._columns.nonfinite[self._layer(layer)]

    def broken(self, layer: str) -> np.ndarray:
        """Whether a quantity had a value that was not finite, ever: (8,) bool, of `QUANTITIES`."""
        return self._columns.broken[self._layer(layer)]

    def counts(self, layer: str) -> np.ndarray:
        """Values a channel in the batch, (T,) int64; 0 where nothing was measured, -1 where it is not known."""
        return self._columns.counts[self._layer(layer)].astype(np.int64)

    def forwards(self, layer: str) -> np.ndarray:
        """How often the layer ran in train mode within each recorded step, (T,) int32."""
        return self._columns.forwards[self._layer(layer)].astype(np.int32)

    def vectors(self, layer: str, quantity: str) -> tuple[np.ndarray, np.ndarray]:
        """Whole vectors of a quantity: the steps that kept them, (K,) int64, and values, (K, C) float32."""
        i, q = self._layer(layer), _quantity(quantity, QUANTITIES)
        starts = self._vector_starts
        start = starts[i] + q * self.layers[i].channels
        values = _equal_payloads(self._vectors, np.dtype((F4, (int(starts[-1]),))))  # rows of float32, not copied
        return self._vectors.steps, values[:, start : start + self.layers[i].channels]

    def probes(self, layer: str, quantity: str) -> tuple[np.ndarray, np.ndarray]:
        """Batch statistics of several batches at the same weights.

        Args:
            layer: a name from `layers`.
            quantity: "batch_mean" or "batch_var".
        Returns:
            The steps at which it was probed, (P,) int64, and the values, (P, B, C) float32. Where probes had
            unlike numbers of batches, B is the largest and the missing ones are NaN.
        """
        i, q = self._layer(layer), _quantity(quantity, PROBED)
        starts, channels = self._probe_starts, self.layers[i].channels
        frames = [np.frombuffer(self._probes.payload(k), F4).reshape(-1, starts[-1]) for k in range(len(self._probes))]
        batches = max((len(values) for values in frames), default=0)
        out = np.full((len(frames), batches, channels), np.nan, np.float32)
        start = starts[i] + q * channels
        for row, values in zip(out, frames, strict=True):
            row[: len(values)] = values[:, start : start + channels]
        return self._probes.steps, out

    def histograms(self, layer: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """How the normalized values xhat = (x - mean) / sqrt(var + eps) of each probed batch are spread.

        A channel's input is mean + sqrt(var + eps) * xhat and its output beta + gamma * xhat, so one histogram shows
        both. In a batch in which a layer runs several times, each call is normalized by itself, and the counts are
        added.

        Args:
            layer: a name from `layers`.
        Returns:
            The steps at which it was probed, (P,) int64; the channels that were kept, (c,) int64: all, or 128 evenly
            spaced ones; and the shares of the batch's values in the bins between `runs.schema.HISTOGRAM_EDGES`, (P, B,
            c, 32) float32, of the first 8 batches of each probe. Values beyond the edges are in the end bins. NaN
            where nothing was measured, or anything in the channel was not finite.
        """
        i = self._layer(layer)
        frames = self._histograms
        return frames.steps, kept_channels(self.layers[i]), decode(frames, self.layers, i)

    def updates(self, layer: str) -> list[Update]:
        """Worked steps: gamma and beta before and after a step, with everything the optimizer used.

        A run keeps a few: records 0 to 5, and then two records from each power of two on. `runs.explain.explain` spells
        out the arithmetic.

        Args:
            layer: a name from `layers`.
        Returns:
            One `Update` a step of the optimizer, ascending; steps in which it did not update the layer are left out.
        """
        return self._updates.of(self._layer(layer))

    def scalars(self) -> list[dict[str, Any]]:
        """The lines of `Recorder.log`, each with its "step"."""
        return self._scalars[0]

    def alerts(self) -> list[dict[str, Any]]:
        """When which values were not finite: {"step", "layer", "quantity", "what", "count"}."""
        return self._alerts[0]

    @property
    def damage(self) -> list[str]:
        """One line for each file that is torn, or not what it should be; [] when all is whole."""
        files = (
            self._stats.damage,
            self._vectors.damage,
            self._probes.damage,
            self._histograms.damage,
            self._update_frames.damage,
            self._updates.damage,
            self._scalars[1],
            self._alerts[1],
            self._optimizers[1],
            self._results[1],
            *self._arms[1],
        )
        return [line for line in files if line]

    @property
    def arms(self) -> dict[str, Run]:
        """The runs of an experiment, in the order in which they ran; those not begun, or unreadable, are left out."""
        return self._arms[0]

    @property
    def main(self) -> Run:
        """The run to look at first: itself, or the arm "learned", or the first arm with layers."""
        arms = self.arms
        if "learned" in arms:
            return arms["learned"]
        return next((arm for arm in arms.values() if arm.layers), self)

    @property
    def results(self) -> dict[str, Any]:
        """What results.json of an experiment says; {} when there is none yet, or none that can be read."""
        return self._results[0]

    def _layer(self, name: str) -> int:
        if name not in self._index:
            raise KeyError(f"no layer {name!r} in {self.path}; it has {', '.join(self._index) or 'none'}")
        return self._index[name]

    @cached_property
    def _arms(self) -> tuple[dict[str, Run], list[str]]:
        opened = {name: self._files.arm(name) for name in self._arm_names}
        found = {name: run for name, run in opened.items() if isinstance(run, Run)}
        damage = [f"arm {name}: {said}" for name, said in opened.items() if isinstance(said, str)]
        return found, damage

    @cached_property
    def _results(self) -> tuple[dict[str, Any], str | None]:
        try:
            return parse(read_regular(self.path / RESULTS), Results), None
        except FileNotFoundError:
            return {}, None
        except (OSError, ValueError) as error:
            return {}, f"{RESULTS}: {error}"

    @cached_property
    def _vector_starts(self) -> np.ndarray:
        return vector_starts(self.layers, len(QUANTITIES))

    @cached_property
    def _probe_starts(self) -> np.ndarray:
        return vector_starts(self.layers, len(PROBED))

    @cached_property
    def _stats(self) -> Frames:
        size = stats_dtype(self.layers).itemsize
        return self._files.frames(STATS, lambda length: length == size)

    @cached_property
    def _vectors(self) -> Frames:
        size = int(self._vector_starts[-1]) * F4.itemsize
        return self._files.frames(VECTORS, lambda length: length == size)

    @cached_property
    def _probes(self) -> Frames:
        size = int(self._probe_starts[-1]) * F4.itemsize
        frames = self._files.frames(PROBES, lambda length: size > 0 and length > 0 and length % size == 0)
        return _alike(frames, PROBES, size)

    @cached_property
    def _histograms(self) -> Frames:
        frames = self._files.frames(HISTOGRAMS, lambda length: is_valid(length, self.layers))
        return _alike(frames, HISTOGRAMS, batch_bytes(self.layers), F4.itemsize)

    @cached_property
    def _update_frames(self) -> Frames:
        size = payload_bytes(self.layers)
        return self._files.frames(UPDATES, lambda length: length == size > 0)

    @cached_property
    def _updates(self) -> Updates:
        return Updates(self.layers, self._update_frames, self._optimizers[0])

    @cached_property
    def _records(self) -> np.ndarray:
        return _equal_payloads(self._stats, stats_dtype(self.layers))

    @cached_property
    def _columns(self) -> Columns:
        return self._files.columns(self._records)

    @cached_property
    def _scalars(self) -> tuple[list[dict[str, Any]], str | None]:
        return self._files.lines(SCALARS)

    @cached_property
    def _alerts(self) -> tuple[list[dict[str, Any]], str | None]:
        return self._files.lines(ALERTS)

    @cached_property
    def _optimizers(self) -> tuple[list[dict[str, Any]], str | None]:
        return self._files.lines(OPTIMIZERS)


def open_run(path: str | os.PathLike[str]) -> Run:
    """The run in a folder, as it is on disk now; open it again to see what was added since.

    Args:
        path: the folder that `watch` or `batchnorm train` wrote.
    Raises:
        FileNotFoundError: no such folder, or no run.json in it.
        ValueError: run.json is not a run's, or of a later format.
    Example:
        >>> import tempfile
        >>> from torch import nn
        >>> from batchnorm import watch
        >>> folder = tempfile.mkdtemp() + "/run"
        >>> with watch(nn.Sequential(nn.BatchNorm1d(3)), folder, layers=[]) as w:
        ...     w.log(loss=0.5)
        >>> run = open_run(folder)
        >>> run.status, [line["loss"] for line in run.scalars()]
        ('finished', [0.5])
    """
    path = Path(path)
    return Run(path, read_facts(path, read_text(path)))


def read_text(path: Path) -> bytes:
    """What run.json in a folder says; raises as `open_run` does where there is none, or no regular file."""
    try:
        return read_regular(path / RUN)
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"{path} is not a run: it has no {RUN}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not a run: {error}") from None


def read_facts(path: Path, text: bytes) -> RunFacts:
    """The facts in the text of a folder's run.json; raises as `open_run` does where they are no run's."""
    try:
        return _facts(text)
    except ValueError as error:
        raise ValueError(f"{path / RUN} does not describe a run: {error}") from None


def _facts(text: bytes) -> RunFacts:
    value = parse(text, _Format)
    if value["format"] > FORMAT:
        raise ValueError(f"format must be {FORMAT}, got {value['format']}: try a later batchnorm")
    facts = typed(value, RunFacts)
    channels = sum(layer.channels for layer in facts.layers or ())
    if channels > MOST_CHANNELS:
        raise ValueError(f"the layers must have at most {MOST_CHANNELS:,} channels together, got {channels:,}")
    return facts


def _try_open(path: Path) -> Run | str | None:
    """The run, or why it cannot be read; None where there is none."""
    try:
        return open_run(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        return str(error)


def list_runs(root: str | os.PathLike[str] = "runs", refused: list[str] | None = None) -> list[Run]:
    """The runs in the folders of `root`, newest first; folders that are no runs are passed over.

    Args:
        root: the folder that holds them.
        refused: gets a line for each folder whose run.json cannot be read.
    """
    opened = [_try_open(path) for path in Path(root).iterdir()] if Path(root).is_dir() else []
    if refused is not None:
        refused += [said for said in opened if isinstance(said, str)]
    runs = [run for run in opened if isinstance(run, Run)]
    return sorted(runs, key=lambda run: (run.created, run.path.name), reverse=True)


def _alike(frames: Frames, name: str, size: int, times: int = 1) -> Frames:
    """The probes up to the first with so many more batches than others that a table would be mostly empty."""
    if not len(frames):
        return frames
    batches = frames.lengths // size
    table = np.maximum.accumulate(batches) * np.arange(1, len(frames) + 1) * (size * times)
    beyond = np.flatnonzero(table > np.maximum(MOST_PADDED * np.cumsum(frames.lengths), LEAST_TABLE))
    if not len(beyond):
        return frames
    keep = int(beyond[0])
    damage = (
        f"{name}: a table of the probes may take at most {MOST_PADDED} times their own bytes; kept the "
        f"{keep} whole frames that stay below this"
    )
    return Frames(frames.data, frames.steps[:keep], frames.starts[:keep], frames.lengths[:keep], damage)


def _quantity(name: str, known: tuple[str, ...]) -> int:
    if name not in known:
        raise KeyError(f"no quantity {name!r}; there are {', '.join(known)}")
    return known.index(name)


def _equal_payloads(frames: Frames, dtype: np.dtype) -> np.ndarray:
    """Payloads that lie evenly spaced in the file, as an array over its bytes."""
    if not len(frames):
        return np.empty(0, dtype)
    stride = int(frames.starts[1] - frames.starts[0]) if len(frames) > 1 else 0
    base, shape = dtype.base, dtype.shape
    strides = (stride, base.itemsize) if shape else (stride,)
    return np.ndarray((len(frames), *shape), base, frames.data, int(frames.starts[0]), strides)
