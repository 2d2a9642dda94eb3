"""How large the page of a long training is, how long writing it takes, and when a browser has painted it.

    python benchmarks/page.py [--steps 50000]

A run with the 53 batch norms of a ResNet-50, as the recorder writes it, with probes, histograms, worked steps. Prints,
and writes to benchmarks/results/page.md: seconds to write the page, its megabytes, and the browser's first paint.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from common import header, save
from live import Training, layers

from batchnorm.runs import histogram, update
from batchnorm.runs.journal import Journal
from batchnorm.runs.lines import Lines
from batchnorm.runs.reader import open_run
from batchnorm.runs.schema import HISTOGRAM_BINS, HISTOGRAMS, OPTIMIZERS, PROBES, UPDATES

BATCHES = 16  # of a probe
FACTS = {"lr": 0.1, "momentum": 0.9, "optimizer": "SGD", "state": "momentum_buffer", "steps": 0, "skipped": False}


def write(path: Path, steps: int) -> None:
    """Write the run."""
    training = Training(path)
    while training.step < steps:
        training.go_on(min(1000, steps - training.step))
    infos, draw = layers(), np.random.default_rng(1)
    channels = sum(info.channels for info in infos)
    (path / PROBES).unlink()
    with Journal(path / PROBES) as probes, Journal(path / HISTOGRAMS) as histograms:
        for step in range(0, steps, 5000):
            probes.append([(step, draw.uniform(0.5, 1.5, (BATCHES, 2 * channels)).astype("<f4").tobytes())])
            counts = (
                histogram.encode(draw.integers(0, 50, (len(histogram.kept_channels(info)), HISTOGRAM_BINS)))
                for _ in range(8)
                for info in infos
            )
            histograms.append([(step, b"".join(counts))])
    lines, kept = Lines(path / OPTIMIZERS), update.kept_channels(infos)
    with Journal(path / UPDATES) as updates:
        for step in (at for k in range(int(np.log2(steps)) + 1) for at in (2**k, 2**k + 1) if k > 2):
            numbers = [draw.normal(1, 0.1, (2, 4, info.channels)).astype(np.float32) for info in infos]
            rows = [[(q, list(of_layer[q]), FACTS | {"dtype": "float32"}) for q in (0, 1)] for of_layer in numbers]
            payload, said = update.encode(step, kept, rows)
            lines.append(said)
            updates.append([(step, payload)])
    lines.close()


def first_paint(page: Path) -> tuple[float, float]:
    """Seconds to the first contentful paint, and to both main charts, of a page opened from disk."""
    from playwright.sync_api import sync_playwright

    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
        opened = browser.new_page(viewport={"width": 1280, "height": 900})
        opened.goto(page.as_uri())
        while not opened.evaluate("document.querySelectorAll('#panels svg.marks').length === 2"):
            opened.wait_for_timeout(20)
        drawn = opened.evaluate("performance.now()") / 1000
        paint = opened.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime") / 1000
        browser.close()
    return paint, drawn


def main() -> None:
    parser = argparse.ArgumentParser(description="The page of a long training: its size, and the time it takes.")
    parser.add_argument("--steps", type=int, default=50_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run"
        write(path, options.steps)
        damage = open_run(path).damage
        assert not damage, damage
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, "-c", TIMED, str(path)]
        seconds = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        page = path / "report.html"
        paint, drawn = first_paint(page)
        rows = [
            (
                f"run: 53 layers, {options.steps:,} steps",
                f"{sum(f.stat().st_size for f in path.iterdir()) / 1e9:.2f} GB",
            ),
            ("page", f"{page.stat().st_size / 1e6:.2f} MB"),
            ("writing it: by the clock; of CPU, Python's start included", f"{seconds:.1f} s; {cpu:.1f} s"),
            ("opened from disk: first paint; both main charts drawn", f"{paint:.2f} s; {drawn:.2f} s"),
        ]
    for row in rows:
        print(*row, sep=": ")
    notes = "Made-up numbers of a ResNet-50's shapes. Other work on the machine stretches the seconds by the clock."
    save(
        "page",
        [*header("The page of a long training", notes), "| | |", "|---|---|", *(f"| {a} | {b} |" for a, b in rows)],
    )


TIMED = """
import sys, time
begin = time.perf_counter()
import batchnorm as bn
bn.report(sys.argv[1])
print(time.perf_counter() - begin)
"""

if __name__ == "__main__":
    main()
