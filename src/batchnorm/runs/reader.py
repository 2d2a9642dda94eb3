"""Reading a run: everything that `watch` wrote, as NumPy arrays, without torch."""

from __future__ import annotations

import json
import os
import re
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from .journal import Frames, read_frames
from .lines import read_lines
from .lock import is_held
from .schema import (
    ALERTS,
    F4,
    FORMAT,
    PROBED,
    PROBES,
    QUANTITIES,
    RUN,
    SCALARS,
    STATS,
    VECTORS,
    LayerInfo,
    stats_dtype,
    vector_starts,
)


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

    def __init__(self, path: Path, facts: dict[str, Any]) -> None:
        self.path = path
        self.status = str(facts.get("status", "running"))
        if self.status == "running" and is_held(path) is False:
            self.status = "interrupted"
        self.created = str(facts.get("created", ""))
        self.meta: dict[str, Any] = facts.get("meta") or {}
        self.layers = [LayerInfo.from_json(layer) for layer in facts.get("layers") or []]
        self.recorded: dict[str, Any] = facts.get("recorded") or {}
        self._index = {layer.name: i for i, layer in enumerate(self.layers)}
        self._arm_names: list[str] = facts.get("arms") or []

    def __repr__(self) -> str:
        arms = f", arms={self._arm_names}" if self._arm_names else ""
        return f"Run({str(self.path)!r}, status={self.status!r}, layers={len(self.layers)}{arms})"

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

    def counts(self, layer: str) -> np.ndarray:
        """Values a channel in the batch, (T,) int64; 0 where nothing was measured, -1 where it is not known."""
        return self._records["count"][:, self._layer(layer)].astype(np.int64)

    def forwards(self, layer: str) -> np.ndarray:
        """How often the layer ran in train mode within each recorded step, (T,) int32."""
        return self._records["forwards"][:, self._layer(layer)].astype(np.int32)

    def vectors(self, layer: str, quantity: str) -> tuple[np.ndarray, np.ndarray]:
        """Whole vectors of a quantity: the steps that kept them, (K,) int64, and values, (K, C) float32."""
        i, q = self._layer(layer), _quantity(quantity, QUANTITIES)
        starts = vector_starts(self.layers, len(QUANTITIES))
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
        starts, channels = vector_starts(self.layers, len(PROBED)), self.layers[i].channels
        frames = [np.frombuffer(self._probes.payload(k), F4).reshape(-1, starts[-1]) for k in range(len(self._probes))]
        batches = max((len(values) for values in frames), default=0)
        out = np.full((len(frames), batches, channels), np.nan, np.float32)
        start = starts[i] + q * channels
        for row, values in zip(out, frames, strict=True):
            row[: len(values)] = values[:, start : start + channels]
        return self._probes.steps, out

    def scalars(self) -> list[dict[str, Any]]:
        """The lines of `Recorder.log`, each with its "step"."""
        return self._scalars[0]

    def alerts(self) -> list[dict[str, Any]]:
        """What was not finite, and when: {"step", "layer", "quantity", "what", "count"}."""
        return self._alerts[0]

    @property
    def damage(self) -> list[str]:
        """One line for each file with a torn or garbage tail; [] when all is whole."""
        files = (
            self._stats.damage,
            self._vectors.damage,
            self._probes.damage,
            self._scalars[1],
            self._alerts[1],
        )
        return [line for line in files if line]

    @cached_property
    def arms(self) -> dict[str, Run]:
        """The runs of an experiment, in the order in which they ran; those not begun are left out."""
        found = {}
        for name in self._arm_names:
            if (self.path / name / RUN).is_file():
                found[name] = open_run(self.path / name)
        return found

    @property
    def main(self) -> Run:
        """The run to look at first: itself, or the arm "learned", or the first arm with layers."""
        arms = self.arms
        if "learned" in arms:
            return arms["learned"]
        return next((arm for arm in arms.values() if arm.layers), self)

    @cached_property
    def results(self) -> dict[str, Any]:
        """What results.json of an experiment says; {} when there is none yet."""
        try:
            results = json.loads((self.path / "results.json").read_bytes())
        except (FileNotFoundError, ValueError):
            return {}
        return results if isinstance(results, dict) else {}

    def _layer(self, name: str) -> int:
        if name not in self._index:
            raise KeyError(f"no layer {name!r} in {self.path}; it has {', '.join(self._index) or 'none'}")
        return self._index[name]

    @cached_property
    def _stats(self) -> Frames:
        size = stats_dtype(self.layers).itemsize
        return read_frames(self.path / STATS, lambda length: length == size)

    @cached_property
    def _vectors(self) -> Frames:
        size = int(vector_starts(self.layers, len(QUANTITIES))[-1]) * F4.itemsize
        return read_frames(self.path / VECTORS, lambda length: length == size)

    @cached_property
    def _probes(self) -> Frames:
        size = int(vector_starts(self.layers, len(PROBED))[-1]) * F4.itemsize
        return read_frames(self.path / PROBES, lambda length: size > 0 and length % size == 0)

    @cached_property
    def _records(self) -> np.ndarray:
        return _equal_payloads(self._stats, stats_dtype(self.layers))

    @cached_property
    def _scalars(self) -> tuple[list[dict[str, Any]], str | None]:
        return read_lines(self.path / SCALARS)

    @cached_property
    def _alerts(self) -> tuple[list[dict[str, Any]], str | None]:
        return read_lines(self.path / ALERTS)


def open_run(path: str | os.PathLike[str]) -> Run:
    """The run in a folder, as it is on disk now; open it again to see what was added since.

    Args:
        path: the folder that `watch` or `batchnorm train` wrote.
    Raises:
        FileNotFoundError: no such folder, or no run.json in it.
        ValueError: run.json is not a run's, or of a later format.
    """
    path = Path(path)
    try:
        text = (path / RUN).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"{path} is not a run: it has no {RUN}") from None
    try:
        facts = json.loads(text)
        if not isinstance(facts, dict):
            raise ValueError(f"expected an object, got {type(facts).__name__}")
        if not isinstance(facts.get("format"), int) or facts["format"] > FORMAT:
            raise ValueError(f"format must be {FORMAT}, got {facts.get('format')!r}: try a later batchnorm")
        if not isinstance(facts.get("meta") or {}, dict):
            raise ValueError("meta must be an object")
        for name in facts.get("arms") or []:  # they become folder names: none may lead out of the run
            if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*", name):
                raise ValueError(f"not a name for an arm: {name!r}")
        return Run(path, facts)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path / RUN} does not describe a run: {error}") from error


def list_runs(root: str | os.PathLike[str] = "runs") -> list[Run]:
    """The runs in the folders of `root`, newest first; folders that are no runs are passed over."""
    runs = []
    for path in Path(root).iterdir() if Path(root).is_dir() else []:
        with suppress(FileNotFoundError, ValueError):
            runs.append(open_run(path))
    return sorted(runs, key=lambda run: (run.created, run.path.name), reverse=True)


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
