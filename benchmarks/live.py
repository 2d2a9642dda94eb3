"""What watching a long training in the browser costs: `batchnorm serve`, a real browser, an hour's worth of steps.

    python benchmarks/live.py [--history 72000] [--seconds 60]

A run with the 53 batch norms of a ResNet-50 is written as the recorder writes it: an hour's steps at once, then 20 a
second while Chromium has the page open, first at its top, then at the bands of every layer. Prints, and writes to
benchmarks/results/live.md: times to first paint, sizes, the browser's memory, the server's share of a processor, and
how long the writer's appends took with and without being watched.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from common import header, save

from batchnorm.runs.folder import create_folder
from batchnorm.runs.journal import HEADER, Journal
from batchnorm.runs.schema import F4, PROBES, QUANTITIES, STATS, VECTORS, LayerInfo, stats_dtype, vector_starts
from batchnorm.watch.schedule import Schedule

A_SECOND = 20
KINDS = 97  # different records that are written in turn: making 72,000 would take longer than writing them


def layers() -> list[LayerInfo]:
    """The batch norms of a ResNet-50 (He et al. 2016), by torchvision's names."""
    found = [("bn1", 64)]
    for stage, (blocks, width) in enumerate(((3, 64), (4, 128), (6, 256), (3, 512)), 1):
        for block in range(blocks):
            name = f"layer{stage}.{block}"
            found += [(f"{name}.bn1", width), (f"{name}.bn2", width), (f"{name}.bn3", 4 * width)]
            found += [(f"{name}.downsample.1", 4 * width)] if block == 0 else []
    return [LayerInfo(name, "BatchNorm2d", channels, 1e-5, 0.1, True, True) for name, channels in found]


class Training:
    """Writes records as fast as asked: jagged measured values, gamma and beta that drift."""

    def __init__(self, path: Path) -> None:
        self.infos = layers()
        self.lock = create_folder(path, self.infos, {"model": "ResNet-50, made up"}, {})
        draw = np.random.default_rng(0)
        channels = sum(info.channels for info in self.infos)
        frame = 8 * channels * F4.itemsize + HEADER.size
        self._schedule = Schedule.within(128 << 20, frame)
        self._files = [Journal(path / name) for name in (STATS, VECTORS, PROBES)]
        self._records = np.zeros(KINDS, stats_dtype(self.infos))
        self._records["count"], self._records["forwards"] = 64 * 49, 1
        self._records["stats"] = np.sort(draw.normal(1, 0.2, self._records["stats"].shape), -1)
        self._records["stats"][..., -1] = 0
        self._draw, self._channels = draw, channels
        self._starts = vector_starts(self.infos, len(QUANTITIES))
        self.step = 0

    def _vectors(self, step: int) -> bytes:
        values = self._draw.normal(1, 0.2, 8 * self._channels).astype(F4)
        for start, info in zip(self._starts, self.infos, strict=False):
            learned = values[start + 2 * info.channels : start + 4 * info.channels]
            learned[:] = 1 + np.linspace(-1, 1, len(learned)) * step / 1e5
        return values.tobytes()

    def go_on(self, steps: int) -> float:
        """Write so many steps at once; return the seconds that the appends took."""
        numbers = range(self.step, self.step + steps)
        stats = [(step, self._records[step % KINDS].tobytes()) for step in numbers]
        vectors = [(step, self._vectors(step)) for step in numbers if self._schedule and self._schedule.keeps(step)]
        shape = (4, 2 * self._channels)
        probes = [(s, self._draw.normal(1, 0.2, shape).astype(F4).tobytes()) for s in numbers if s % 5000 == 0]
        begin = time.perf_counter()
        for file, records in zip(self._files, (stats, vectors, probes), strict=True):
            if records:
                file.append(records)
        self.step += steps
        return time.perf_counter() - begin

    def pace(self, seconds: float) -> list[float]:
        """Write 20 steps a second; return how long each append took."""
        took, begin = [], time.perf_counter()
        for k in range(int(seconds * A_SECOND)):
            time.sleep(max(0.0, begin + k / A_SECOND - time.perf_counter()))
            took.append(self.go_on(1))
        return took


def watch(url: str, training: Training, server: psutil.Process, seconds: float) -> Iterator[tuple[str, str]]:
    """Open the page while the training goes on; yield what was measured, and its value."""
    from playwright.sync_api import sync_playwright

    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
        news: list[int] = []
        for name in ("first page after the server's start", "page opened again"):
            page = browser.new_page(viewport={"width": 1280, "height": 900})
            begin = time.perf_counter()
            page.goto(url, timeout=300_000)
            drawn = "document.querySelectorAll('#panels svg.marks').length === 2"
            while not page.evaluate(drawn):
                time.sleep(0.02)
            charts = time.perf_counter() - begin
            paint = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime") / 1000
            wait = page.evaluate("performance.getEntriesByType('navigation')[0].responseStart") / 1000
            yield (
                f"{name}: server's answer, first paint, both main charts drawn",
                (f"{wait:.2f} s, {paint:.2f} s, {charts:.2f} s"),
            )
            size = page.evaluate("performance.getEntriesByType('navigation')[0].encodedBodySize")
            if name.startswith("first"):
                yield "page", f"{size / 1e6:.2f} MB"
                page.close()
        session = page.context.new_cdp_session(page)
        page.on("response", lambda response: news.append(response.status) if "/news?" in response.url else None)

        def heap() -> float:
            session.send("HeapProfiler.collectGarbage")
            return session.send("Runtime.getHeapUsage")["usedSize"] / 1e6

        appends: list[float] = []
        for place in ("top of the page", "bands of 53 layers in view"):
            if place.startswith("bands"):
                page.evaluate("document.querySelector('#chart-gamma_bands').scrollIntoView()")
                page.wait_for_timeout(5000)
            news.clear()
            heaps, cpu, begin = [heap()], _cpu(server), time.perf_counter()
            writer = threading.Thread(target=lambda: appends.extend(training.pace(seconds / 2)))
            writer.start()
            while writer.is_alive():
                page.wait_for_timeout(5000)
                heaps.append(heap())
            writer.join()
            share = (_cpu(server) - cpu) / (time.perf_counter() - begin)
            yield f"{place}: renewals in {time.perf_counter() - begin:.0f} s", str(len(news))
            yield f"{place}: server's share of one processor", f"{share:.1%}"
            yield f"{place}: JS heap, first, largest, last", f"{heaps[0]:.0f}, {max(heaps):.0f}, {heaps[-1]:.0f} MB"
        body = page.evaluate("fetch('news').then(answer => answer.text()).then(text => text.length)")
        yield "news, the payload of a renewal", f"{body / 1e6:.2f} MB"
        yield "server's memory (resident)", f"{server.memory_info().rss / 1e9:.2f} GB"
        yield "appends of a record while watched: median, largest", _times(appends)
        assert page.is_hidden("#hearing")
        browser.close()
    yield "appends of a record, nobody watching: median, largest", _times(training.pace(seconds / 2))


def _cpu(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def _times(seconds: list[float]) -> str:
    return f"{1e3 * statistics.median(seconds):.2f}, {1e3 * max(seconds):.1f} ms"


def main() -> None:
    parser = argparse.ArgumentParser(description="What watching a long training in the browser costs.")
    parser.add_argument("--history", type=int, default=72_000, help="steps that are there already")
    parser.add_argument("--seconds", type=float, default=60, help="to watch")
    options = parser.parse_args()
    rows: list[tuple[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run"
        training = Training(path)
        while training.step < options.history:
            training.go_on(min(1000, options.history - training.step))
        size = sum(file.stat().st_size for file in path.iterdir())
        rows.append((f"run: 53 layers, {training.step:,} steps", f"{size / 1e9:.2f} GB"))
        print(*rows[-1], sep=": ", flush=True)
        command = [sys.executable, "-m", "batchnorm", "serve", str(path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            try:
                url = server.stdout.readline().strip()
                for row in watch(url, training, psutil.Process(server.pid), options.seconds):
                    rows.append(row)
                    print(*row, sep=": ", flush=True)
            finally:
                server.terminate()
    notes = (
        f"An hour's worth of steps of a ResNet-50's batch norms as history, then {A_SECOND} steps a second for "
        f"{options.seconds:.0f} s while headless Chromium has the page open, on the same machine. The heap is measured "
        "after a garbage collection. Seconds are of the clock, and other work stretches them; shares are of CPU time."
    )
    save("live", [*header("Watching a training", notes), "| | |", "|---|---|", *(f"| {a} | {b} |" for a, b in rows)])


if __name__ == "__main__":
    main()
