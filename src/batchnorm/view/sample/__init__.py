"""A recorded training in the package, for a page without one's own: made by `make sample`, see benchmarks/sample.py."""

from __future__ import annotations

from pathlib import Path

from ...runs.reader import Run, open_run

FOLDER = Path(__file__).parent / "gamma-beta-on-digits"


def open_sample() -> Run:
    """Return the sample: a small convolutional network on scikit-learn's digits, in which only gamma and beta learn."""
    return open_run(FOLDER)
