"""A run as one long table of pandas, polars or pyarrow."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from importlib.util import find_spec
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from .rows import stats_rows
from .schema import COLUMNS

if TYPE_CHECKING:
    from .reader import Run

LIBRARIES = {"pandas": "DataFrame", "polars": "DataFrame", "pyarrow": "table"}
TEXT = ("layer", "quantity")
NUMBERS = {"step": np.int64, **dict.fromkeys(COLUMNS, np.float32), "count": np.int64, "forwards": np.int32}


def to_frame(run: Run, library: str | None = None) -> Any:
    """Return what was recorded at every step as a table: a row a step, layer and quantity, as `stats` has them.

    A quantity that did not exist at a step has no row. An experiment's table has the rows of all its arms.

        arm                              text, the arm's name; in an experiment alone
        step                             int64
        layer, quantity                  text; the quantity is one of `QUANTITIES`
        min, p05, p25, p50, p75, p95,    float32, over the layer's channels, of the finite values
        max, mean
        nonfinite                        float32, how many channels were not finite
        count                            int64, values a channel in the batch; 0 where nothing was measured, -1 unknown
        forwards                         int32, how often the layer ran in train mode within the step

    Args:
        run: from `open_run`; `run.to_frame()` is the same.
        library: "pandas", "polars" or "pyarrow"; the first of them that is installed, if not given.
    Returns:
        A pandas.DataFrame, a polars.DataFrame or a pyarrow.Table.
    Raises:
        ValueError: there is no such library here.
        ModuleNotFoundError: it, or each of them, is not installed.
    """
    if library is not None and library not in LIBRARIES:
        raise ValueError(f"library must be one of {', '.join(LIBRARIES)}, got {library!r}")
    make = _maker(LIBRARIES if library is None else (library,))
    return make(_columns(run))


def _maker(libraries: Iterable[str]) -> Any:
    """The function of the first of the libraries that is installed which makes a table of columns."""
    there = next(filter(find_spec, libraries), None)
    if there is None:
        wanted = " or ".join(libraries)
        cure = f"pip install {next(iter(libraries))}"
        raise ModuleNotFoundError(f"to_frame() makes a table of {wanted}, which is not installed: {cure}")
    return getattr(import_module(there), LIBRARIES[there])


def _columns(run: Run) -> dict[str, Any]:
    arms = run.arms or {"": run}
    parts = [(name, part) for name, arm in arms.items() for part in stats_rows(arm)]
    text = {name: list(chain.from_iterable(part[name] for _, part in parts)) or np.empty(0, str) for name in TEXT}
    numbers = {
        name: np.concatenate([np.empty(0, dtype), *(part[name] for _, part in parts)], dtype=dtype)
        for name, dtype in NUMBERS.items()
    }
    own = {"arm": [name for name, part in parts for _ in part["step"]]} if run.arms else {}
    return {**own, "step": numbers["step"], **text, **numbers}
