"""Histograms of the normalized values of each probed batch: a byte a bin."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .journal import Frames
from .schema import HISTOGRAM_BATCHES, HISTOGRAM_BINS, HISTOGRAM_CHANNELS, LayerInfo, spread

# A share s is stored as 254 * sqrt(s), rounded: small shares, in the tails, keep their digits.
MOST, MISSING = 254, 255
_SHARES = np.append(np.square(np.arange(MOST + 1) / MOST), np.nan).astype(np.float32)


def kept_channels(layer: LayerInfo) -> np.ndarray:
    """The channels of which histograms are kept, ascending: all, or 128 evenly spaced ones."""
    return spread(layer.channels, HISTOGRAM_CHANNELS)


def batch_bytes(layers: Sequence[LayerInfo]) -> int:
    """What a batch takes in a frame of `histograms-0001.bin`."""
    return HISTOGRAM_BINS * sum(len(kept_channels(layer)) for layer in layers)


def is_valid(length: int, layers: Sequence[LayerInfo]) -> bool:
    """Whether a payload can have this length: of 1 to 8 batches."""
    size = batch_bytes(layers)
    return size > 0 and length % size == 0 and 0 < length // size <= HISTOGRAM_BATCHES


@np.errstate(invalid="ignore")  # nothing counted is nothing known: 0 / 0
def encode(counts: np.ndarray) -> bytes:
    """Counts of one layer in one batch, (c, bins), as bytes; what has none as missing."""
    return stored(counts / counts.sum(1, keepdims=True)).tobytes()


@np.errstate(invalid="ignore")
def stored(shares: np.ndarray) -> np.ndarray:
    """Shares, NaN where there are none, as the bytes that stand for them: uint8 of the same shape."""
    return np.where(np.isnan(shares), MISSING, np.rint(MOST * np.sqrt(shares))).astype(np.uint8)


def decode(frames: Frames, layers: Sequence[LayerInfo], i: int) -> np.ndarray:
    """The shares of the i-th layer, (P, B, c, bins) float32; NaN where there are none."""
    widths = [HISTOGRAM_BINS * len(kept_channels(layer)) for layer in layers]
    start, size = sum(widths[:i]), sum(widths)
    batches = int(frames.lengths.max(initial=0)) // size
    out = np.full((len(frames), batches, widths[i]), np.nan, np.float32)
    for k, row in enumerate(out):
        stored = np.frombuffer(frames.payload(k), np.uint8).reshape(-1, size)
        row[: len(stored)] = _SHARES[stored[:, start : start + widths[i]]]
    return out.reshape(len(frames), batches, widths[i] // HISTOGRAM_BINS, HISTOGRAM_BINS)
