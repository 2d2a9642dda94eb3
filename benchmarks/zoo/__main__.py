"""Public models with random weights: what converts, fuses, folds, and whether it computes the same.

    make zoo
    python -m zoo [--library timm] [--model NAME] [--jobs 2] [--seconds 300] [--rows FILE]       (in benchmarks/)

prints a row a model; over all of them it writes benchmarks/results/zoo.md. Each model has a process of its own, so that
one that crashes, or takes too long or too much memory, is a row that says so. Which batch norms a model has, which
activations came after them and which layers before them is seen from outside (zoo/pairs.py). Needs torchvision, timm,
transformers and segmentation_models_pytorch; fetches no weights. With a file for the rows, a run that was stopped goes
on.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .models import named
from .table import Row, left, line, page, totals

BENCHMARKS = Path(__file__).parent.parent
LIBRARIES = ("torch", "torchvision", "timm", "transformers", "segmentation_models_pytorch")
MEMORY_BYTES = 16 << 30  # of addresses; a model and its copies here use a few GB at most


def one(library: str, name: str) -> None:
    """Check one model and print its row as JSON, last."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    import torch

    from .check import check

    torch.set_num_threads(1)
    print("\n" + json.dumps(check(library, name)))


def run(library: str, name: str, seconds: float) -> Row:
    """The row of one model, checked in a process of its own."""
    command = [sys.executable, "-m", "zoo", "--library", library, "--model", name, "--one"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(BENCHMARKS.parent / "src")}
    failed: dict[str, Any] = {"library": library, "model": name}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds, cwd=BENCHMARKS, env=environment, check=False
        )
    except subprocess.TimeoutExpired:
        return {**failed, "failed": f"not done after {seconds:g} s"}
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return {**failed, "failed": lines[-1][:160] if lines else f"exit status {done.returncode}"}
    return json.loads(done.stdout.strip().splitlines()[-1])


def read(file: Path) -> list[Row]:
    """The rows of an earlier run."""
    return [json.loads(text) for text in file.read_text().splitlines()] if file.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--library")
    parser.add_argument("--model")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--rows", type=Path, default=Path(os.devnull))
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        one(options.library, options.model)
        return
    chosen = [(lib, name) for lib, name in named() if options.library in (None, lib) and options.model in (None, name)]
    before = {(row["library"], row["model"]): row for row in read(options.rows)}

    def row_of(each: tuple[str, str]) -> Row:
        return before.get(each) or run(*each, options.seconds)

    rows = []
    with ThreadPoolExecutor(options.jobs) as pool, options.rows.open("a") as file:
        for row in pool.map(row_of, chosen):
            rows.append(row)
            print(line(row), flush=True)
            if (row["library"], row["model"]) not in before:
                print(json.dumps(row), file=file, flush=True)
    print("\n".join([*totals(rows), *left(rows)]))
    if len(chosen) == len(list(named())):
        versions = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
        (BENCHMARKS / "results" / "zoo.md").write_text(page(rows, versions))


if __name__ == "__main__":
    main()
