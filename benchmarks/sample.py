"""Makes the sample run that `batchnorm report --sample` shows: make sample, minutes.

It trains the experiment in which only gamma and beta learn, with a small convolutional network on scikit-learn's
digits, and keeps evenly spaced records, so that the package stays small. Files it does not know, which later recorders
may write, are kept whole.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from batchnorm.runs import Run, open_run
from batchnorm.runs.journal import Journal, read_frames
from batchnorm.runs.lines import Lines, read_lines
from batchnorm.runs.schema import HISTOGRAMS, PROBES, RESULTS, RUN, SCALARS, STATS, UPDATES, VECTORS
from batchnorm.view.sample import FOLDER
from batchnorm.view.select import thin

TRAIN = ["--experiment", "gamma-beta", "--model", "cnn", "--epochs", "24", "--batch-size", "16"]
STEPS, PROBED, WORKED = 30, 4, 8
MOST_BYTES = 520_000
# By the file, how many records of it an arm keeps; of the arms beside the main one fewer, for they show less.
KEPT = {STATS: STEPS, VECTORS: STEPS, SCALARS: STEPS, PROBES: PROBED, HISTOGRAMS: PROBED // 2, UPDATES: WORKED}
NONE = {PROBES: 0, HISTOGRAMS: 0, UPDATES: 0}
BESIDE = {"fixed": {VECTORS: 6, **NONE}, "per-batch": NONE}
DESCRIBED = (RUN, RESULTS)
LEFT_OUT = ("report.html", "checkpoint.pt", ".lock")


def make(run: Run, out: Path) -> None:
    """Write what is kept of an experiment into a new folder."""
    out.mkdir(parents=True)
    for name in DESCRIBED:
        shutil.copyfile(run.path / name, out / name)
    for name, arm in run.arms.items():
        (out / name).mkdir()
        kept = {**KEPT, **BESIDE.get(name, {})}
        for file in sorted(arm.path.iterdir()):
            if file.name not in LEFT_OUT:
                _thinned(file, out / name / file.name, kept)


def _thinned(file: Path, out: Path, kept: dict[str, int]) -> None:
    """Copy a file of a run, or so many evenly spaced records of it; none where it is to keep none."""
    if file.name not in kept:
        shutil.copyfile(file, out)
    elif file.suffix == ".jsonl":
        rows, _ = read_lines(file)
        lines = Lines(out)
        lines.append([rows[i] for i in _some(len(rows), kept[file.name])])
        lines.close()
    elif kept[file.name]:
        frames = read_frames(file)
        # Probes lie ever further apart: the last of them are spread over the run.
        at = _last if file.name in (PROBES, HISTOGRAMS) else _some
        with Journal(out) as journal:
            chosen = at(len(frames), kept[file.name])
            journal.append([(int(frames.steps[i]), bytes(frames.payload(i))) for i in chosen])


def _some(count: int, most: int) -> list[int]:
    return thin(count, most).tolist() if count else []


def _last(count: int, most: int) -> list[int]:
    return list(range(max(count - most, 0), count))


def main() -> None:
    """Train, keep, and put it where the package has it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, help="an experiment that was trained already")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        path = given.run
        if path is None:
            path = Path(scratch) / "trained"
            subprocess.run([sys.executable, "-m", "batchnorm", "train", *TRAIN, "--out", str(path)], check=True)
        made = Path(scratch) / "sample"
        make(open_run(path), made)
        size = sum(file.stat().st_size for file in made.rglob("*") if file.is_file())
        if size > MOST_BYTES:
            sys.exit(f"the sample has {size:,} bytes, and may have {MOST_BYTES:,}: keep fewer records")
        shutil.rmtree(FOLDER, ignore_errors=True)
        shutil.copytree(made, FOLDER)
    sample = open_run(FOLDER)
    steps = np.unique(np.concatenate([arm.steps for arm in sample.arms.values()]))
    print(f"{FOLDER}: {size:,} bytes, {len(steps)} steps, damage {sample.damage}")


if __name__ == "__main__":
    main()
