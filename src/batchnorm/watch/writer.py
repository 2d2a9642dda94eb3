"""The background thread that turns snapshots into records and hands them to the operating system."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from ..runs.histogram import is_valid
from ..runs.journal import Frames, Journal, read_frames
from ..runs.lines import Lines
from ..runs.schema import (
    ALERTS,
    COLUMNS,
    F4,
    HISTOGRAMS,
    OPTIMIZERS,
    PROBED,
    PROBES,
    QUANTITIES,
    STATS,
    UPDATES,
    VECTORS,
    LayerInfo,
    stats_dtype,
    vector_starts,
)
from ..runs.update import payload_bytes
from .digest import Digest
from .schedule import Schedule
from .snapshot import Extra, Snapshot

# Snapshots wait this long for company: many at once cost the interpreter, which training needs too, hardly more than
# one. It is also what a killed process loses, at most, of the steps it took.
_LINGER_SECONDS = 0.05
_QUEUE_BYTES = 64 << 20


class Writer:
    """Writes one run's journals; `submit` returns at once unless the thread is far behind.

    Attributes:
        records: how many the journal has.
        cpu_seconds: that the thread has computed for.
        reports: of the records written, if asked for: whoever wants them takes them out.
        error: what has stopped it.

    Nobody waits for a thread that is not there, in a forked process, say.
    """

    def __init__(
        self,
        path: Path,
        layers: Sequence[LayerInfo],
        schedule: Schedule | None,
        before_step: int | None = None,
        reports: bool = False,
    ) -> None:
        vectors = int(vector_starts(layers, len(QUANTITIES))[-1]) * F4.itemsize
        probes = int(vector_starts(layers, len(PROBED))[-1]) * F4.itemsize
        record = stats_dtype(layers).itemsize
        updates = payload_bytes(layers)
        self._stats = Journal(path / STATS, before_step, lambda n: n == record)
        self._vectors = Journal(path / VECTORS, before_step, lambda n: n == vectors)
        self._extras = {
            PROBES: Journal(path / PROBES, before_step, lambda n: probes > 0 and n % probes == 0),
            HISTOGRAMS: Journal(path / HISTOGRAMS, before_step, lambda n: is_valid(n, layers)),
            UPDATES: Journal(path / UPDATES, before_step, lambda n: n == updates),
        }
        self._alerts = Lines(path / ALERTS, before_step)
        self._rows = {OPTIMIZERS: Lines(path / OPTIMIZERS, before_step)}
        before = read_frames(path / STATS, lambda n: n == record)
        self._digest = Digest(layers, schedule, _last_nonfinite(before, layers))
        self._layers, self._reports = layers, reports
        self.reports: deque[dict[str, float]] = deque()
        self.records = len(before)
        self.cpu_seconds = 0.0
        self._queue: deque[Snapshot | Extra] = deque()
        self._capacity = max(4, min(256, _QUEUE_BYTES // max(1, vectors)))
        self._submitted = self._written = 0  # each moved by one thread alone
        self._wake, self._hurry = threading.Event(), threading.Event()
        self._closing = False
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="batchnorm-recorder", daemon=True)
        self._thread.start()

    def submit(self, item: Snapshot | Extra) -> None:
        """Queue what is to be written; waits while the queue is full."""
        while len(self._queue) >= self._capacity and self._thread.is_alive():
            self._hurry.set()
            time.sleep(0.001)
        self._submitted += 1
        self._queue.append(item)
        if not self._wake.is_set():
            self._wake.set()

    def flush(self) -> None:
        """Wait until all that was submitted is with the operating system, which no kill of the process undoes."""
        while self._written < self._submitted and self._thread.is_alive():
            self._hurry.set()
            time.sleep(0.001)

    def close(self) -> None:
        """Write what is queued, and close the files."""
        self._closing = True
        self._hurry.set()
        self._wake.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            closing = False
            while not closing:
                self._wake.wait()
                self._hurry.wait(_LINGER_SECONDS)
                # In this order: what is queued from here on wakes the thread again.
                closing = self._closing
                self._hurry.clear()
                self._wake.clear()
                self._drain()
                self.cpu_seconds = time.thread_time()
        except BaseException as error:  # handed to the training thread, which must not die of a full disk
            self.error = error
        finally:
            try:
                with ExitStack() as stack:
                    for file in (
                        self._stats,
                        self._vectors,
                        *self._extras.values(),
                        self._alerts,
                        *self._rows.values(),
                    ):
                        stack.callback(file.close)
            except OSError as error:
                self.error = self.error or error

    def _drain(self) -> None:
        items = [self._queue.popleft() for _ in range(len(self._queue))]
        snapshots = [item for item in items if isinstance(item, Snapshot)]
        if snapshots:
            records = self._digest(snapshots)
            if records.alerts:
                self._alerts.append(records.alerts)
            if records.stats:
                self._stats.append(records.stats)
                self.records += len(records.stats)
                if self._reports:
                    self.reports.extend(flat_numbers(self._layers, step, row) for step, row in records.stats)
            if records.vectors:
                self._vectors.append(records.vectors)
        for extra in items:
            if isinstance(extra, Extra):
                for name, content in extra.contents().items():
                    if isinstance(content, bytes):
                        self._extras[name].append([(extra.step, content)])
                    else:
                        self._rows[name].append(content)
        for journal in (self._stats, self._vectors, *self._extras.values()):
            journal.sync()
        self._written += len(items)


def flat_numbers(layers: Sequence[LayerInfo], step: int, record: bytes) -> dict[str, float]:
    """A record as loggers take it: {"step": 3, "bn/<layer>/<quantity>_<mean, min, max>": ...}, of finite values.

    What does not exist is left out; "..._nonfinite" counts the values that are not finite, where there are any.
    """
    numbers: dict[str, float] = {"step": step}
    for layer, of_layer in zip(layers, np.frombuffer(record, stats_dtype(layers))[0]["stats"].tolist(), strict=True):
        for quantity, row in zip(QUANTITIES, of_layer, strict=True):
            of_quantity = dict(zip(COLUMNS, row, strict=True))
            for column in ("mean", "min", "max", "nonfinite"):
                value = of_quantity[column]
                if math.isfinite(value) and (column != "nonfinite" or value):
                    numbers[f"bn/{layer.name}/{quantity}_{column}"] = value
    return numbers


def _last_nonfinite(frames: Frames, layers: Sequence[LayerInfo]) -> np.ndarray:
    """How many values of each quantity, (layers, quantities), were not finite when last seen: known to the alerts."""
    last = np.zeros((len(layers), len(QUANTITIES)), np.float32)
    dtype = stats_dtype(layers)
    for k in range(len(frames)):
        nonfinite = np.frombuffer(frames.payload(k), dtype)[0]["stats"][..., -1]
        last = np.where(np.isnan(nonfinite), last, nonfinite)
    return last
