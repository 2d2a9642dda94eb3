"""Public models with random weights: what converts, fuses, folds, and whether it computes the same.

    make zoo
    python -m zoo [--library timm] [--model NAME] [--jobs 2] [--seconds 300]       (in benchmarks/)

prints a row a model and writes benchmarks/results/zoo.md. Each model has a process of its own, so that one that crashes
is a row that says so. Which batch norms a model has, which activations came after them, and which layers before them,
is seen from outside (zoo/pairs.py), by nothing of this package. Needs torchvision, timm, transformers and
segmentation_models_pytorch; no weights are fetched.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .models import named

RESULTS = Path(__file__).parent.parent / "results" / "zoo.md"
LIBRARIES = ("torch", "torchvision", "timm", "transformers", "segmentation_models_pytorch")


def one(library: str, name: str) -> None:
    """Check one model and print its row as JSON, last."""
    import torch

    from .check import check

    torch.set_num_threads(1)
    print("\n" + json.dumps(check(library, name)))


def run(library: str, name: str, seconds: float) -> dict[str, Any]:
    """The row of one model, checked in a process of its own."""
    command = [sys.executable, "-m", "zoo", "--library", library, "--model", name, "--one"]
    where = {"cwd": str(RESULTS.parent.parent), "env": {**os.environ, "OMP_NUM_THREADS": "1"}}
    failed: dict[str, Any] = {"library": library, "model": name}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, **where)  # pyright: ignore
    except subprocess.TimeoutExpired:
        return {**failed, "failed": f"not done after {seconds:g} s"}
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return {**failed, "failed": lines[-1][:160] if lines else f"exit status {done.returncode}"}
    return json.loads(done.stdout.strip().splitlines()[-1])


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    if "failed" in row:
        return f"| {row['library']} | {row['model']} | failed: {row['failed'].replace('|', '/')} |" + " |" * 7
    what = "; ".join([*row["wrong"], *(f"{n} passed over" for n in row["silent"])]) or "0"
    fused = f"{row['fused']} of {row['pairs']}" + (f", {row['explained']} named" if row["explained"] else "")
    converted = str(row["converted"]) + (f", {row['named']} named: {row['reasons']}" if row["named"] else "")
    found = "all" if row["diagnosed"] and row["summary"] in (None, row["norms"]) else "not all"
    cells = (row["library"], row["model"], row["norms"], converted, what, fused, row["others"])
    cells += (f"{row['folded']} of {row['foldable']}", f"{found}, {row['serious']}")
    return "| " + " | ".join(str(cell).replace("|", "/") for cell in cells) + " |"


def totals(rows: list[dict[str, Any]]) -> list[str]:
    """What to reach, and what was."""
    done = [row for row in rows if "failed" not in row]
    total = {
        key: sum(row[key] for row in done) for key in ("norms", "converted", "named", "pairs", "fused", "explained")
    }
    total |= {key: sum(row[key] for row in done) for key in ("foldable", "folded")}
    silent, wrong = sum(len(row["silent"]) for row in done), sum(bool(row["wrong"]) for row in done)
    of = lambda part, whole: f"{total[part]:,} of {total[whole]:,} ({100 * total[part] / max(1, total[whole]):.1f} %)"  # noqa: E731
    return [
        f"- {len(done)} of {len(rows)} models ran; in {wrong} something was wrong.",
        f"- Batch norms converted: {of('converted', 'norms')}; named with a reason: {total['named']}; "
        f"passed over in silence: {silent}.",
        f"- Batch norms with an activation after them, or an addition and one, that ran in one operation: "
        f"{of('fused', 'pairs')}; named: {total['explained']}; "
        f"neither: {total['pairs'] - total['fused'] - total['explained']}.",
        f"- Batch norms right after a convolution or linear layer that folded: {of('folded', 'foldable')}.",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--library")
    parser.add_argument("--model")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        one(options.library, options.model)
        return
    chosen = [(lib, name) for lib, name in named() if options.library in (None, lib) and options.model in (None, name)]
    rows = []
    with ThreadPoolExecutor(options.jobs) as pool:
        for row in pool.map(lambda each: run(each[0], each[1], options.seconds), chosen):
            rows.append(row)
            print(line(row), flush=True)
    print("\n".join(totals(rows)))
    if options.library is None and options.model is None:
        versions = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
        head = ["# Public models", "", f"`make zoo`: {versions}; random weights, small inputs.", "", *totals(rows), ""]
        head += [
            "`wrong` compares one training step (outputs, gradients, running statistics, counters) of the converted",
            "model and of the converted and fused one with torch's in float64 (to 1e-8) and in float32 (at most 4",
            "times torch's own error), the state_dict's keys, the classes after `revert`, the folded model's outputs.",
            "`found` says whether `diagnose` and `summary` see every batch norm, and counts serious findings of the",
            "model as it is built.",
            "",
            "| library | model | batch norms | converted | wrong | activations fused | other activations | folded "
            "| found, serious |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        RESULTS.write_text("\n".join([*head, *map(line, rows)]) + "\n")


if __name__ == "__main__":
    main()
