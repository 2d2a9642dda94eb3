"""Quantiles, mean and non-finite count of many rows at once: the nine `COLUMNS` of a record."""

from __future__ import annotations

import numpy as np

from ..runs.schema import COLUMNS

_LEVELS = np.array([0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0])


@np.errstate(all="ignore")
def summarize(values: np.ndarray) -> np.ndarray:
    """The nine `COLUMNS` of each row: of its finite values, and how many were not finite.

    Quantiles interpolate linearly between order statistics (NumPy's default, Hyndman & Fan's type 7).

    Args:
        values: (..., C) float32, C >= 1.
    Returns:
        (..., 9) float32.
    Example:
        >>> summarize(np.array([[0, 1, 2, 3, np.nan]], np.float32))[0, [0, 3, 6, 7, 8]].tolist()
        [0.0, 1.5, 3.0, 1.5, 1.0]
    """
    rows = values.reshape(-1, values.shape[-1])
    out = np.empty((len(rows), len(COLUMNS)), np.float32)
    # A row's sum is not finite exactly when one of its values is not: float64 holds any sum of float32s.
    means = rows.mean(axis=1, dtype=np.float64)
    whole = np.isfinite(means)
    if whole.all():
        _summarize_finite(rows, means, out)
    else:
        kept = np.empty((int(whole.sum()), len(COLUMNS)), np.float32)
        _summarize_finite(rows[whole], means[whole], kept)
        out[whole] = kept
        for i in np.flatnonzero(~whole):
            out[i] = _summarize_one(rows[i])
    return out.reshape(*values.shape[:-1], len(COLUMNS))


def _summarize_finite(rows: np.ndarray, means: np.ndarray, out: np.ndarray) -> None:
    ordered = np.sort(rows, axis=1)
    place = _LEVELS * (rows.shape[1] - 1)
    low = np.floor(place).astype(np.int64)
    high = np.minimum(low + 1, rows.shape[1] - 1)
    below, above = ordered[:, low].astype(np.float64), ordered[:, high]
    out[:, : len(_LEVELS)] = below + (above - below) * (place - low)
    out[:, -2] = means
    out[:, -1] = 0


def _summarize_one(row: np.ndarray) -> np.ndarray:
    finite = row[np.isfinite(row)]
    out = np.full((1, len(COLUMNS)), np.nan, np.float32)
    if len(finite):
        _summarize_finite(finite[None], finite.mean(dtype=np.float64)[None], out)
    out[0, -1] = len(row) - len(finite)
    return out[0]
