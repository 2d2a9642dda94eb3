"""What a run holds: names of files and quantities, a layer's facts, and the bytes of each kind of record."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, TypedDict

import numpy as np
from msgspec import Meta

FORMAT = 1
RUN = "run.json"
STATS, VECTORS, PROBES = "stats-0001.bin", "vectors-0001.bin", "probes-0001.bin"
UPDATES, HISTOGRAMS = "updates-0001.bin", "histograms-0001.bin"
SCALARS, ALERTS, OPTIMIZERS = "scalars.jsonl", "alerts.jsonl", "optimizers.jsonl"
RESULTS = "results.json"

QUANTITIES = (
    "batch_mean",
    "batch_var",
    "gamma",
    "beta",
    "gamma_grad",
    "beta_grad",
    "running_mean",
    "running_var",
)
PROBED = QUANTITIES[:2]
LEARNED = ("gamma", "beta")
COLUMNS = ("min", "p05", "p25", "p50", "p75", "p95", "max", "mean", "nonfinite")

# Little-endian on every machine, so that a run can be read where it was not written.
F4, I4, I8 = np.dtype("<f4"), np.dtype("<i4"), np.dtype("<i8")


Finite = Annotated[float, Meta(ge=-sys.float_info.max, le=sys.float_info.max)]
Int64 = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Share = Annotated[float, Meta(ge=0, le=1)]

# NumPy's records hold less than 2 GiB: so many channels of 8 quantities, all layers together.
MOST_CHANNELS = (2**31 - 1) // (4 * len(QUANTITIES))
MOST_LAYERS = 20_000
MOST_ARMS = 1_000

# Of (x - mean) / sqrt(var + eps), of at most 8 batches a probe and 128 channels a layer; what lies beyond the edges is
# in the end bins.
HISTOGRAM_BINS = 32
HISTOGRAM_EDGES = np.linspace(-4.0, 4.0, HISTOGRAM_BINS + 1)
HISTOGRAM_BATCHES, HISTOGRAM_CHANNELS = 8, 128
# The file of worked steps stays below 16 MiB in ten million records, of which 50 are worked; 48 bytes a channel.
MOST_UPDATED = (16 << 20) // 50 // 48


@dataclass(frozen=True)
class LayerInfo:
    """One watched layer, as it was when the watching began."""

    name: str
    kind: str
    channels: Annotated[int, Meta(ge=1, le=MOST_CHANNELS)]
    eps: Finite
    momentum: Finite | None
    affine: bool
    tracks: bool

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class RunFacts:
    """What run.json says; what a reader does not know of is passed over."""

    format: int
    status: str = "running"
    created: str = ""
    meta: dict[str, Any] | None = None
    layers: Annotated[list[LayerInfo], Meta(max_length=MOST_LAYERS)] | None = None
    recorded: dict[str, Any] | None = None
    # They become folder names: none may lead out of the run.
    arms: Annotated[list[Annotated[str, Meta(pattern=r"^\w[\w.-]*\Z")]], Meta(max_length=MOST_ARMS)] | None = None


class _Curve(TypedDict, total=False):
    step: list[Int64]
    test_accuracy: list[Share | None]


class _Singles(TypedDict):
    min: Share
    median: Share
    max: Share
    all: Annotated[list[Share], Meta(min_length=1)]


class _Spread(TypedDict):
    gamma_std: Finite | None
    beta_std: Finite | None


class ArmResults(TypedDict, total=False):
    """What results.json says of an arm, as far as anybody here reads it."""

    test_accuracy: Share | None
    train_accuracy: Share | None
    test_loss: Finite | None
    train_loss: Finite | None
    steps: Count
    seconds: Finite
    curve: _Curve | None
    single_pair_accuracy: _Singles | None
    pair_spread: _Spread | None


class Results(TypedDict, total=False):
    """What results.json says."""

    arms: dict[str, ArmResults]


# A logged value, or a fact of an alert: nothing nested.
Line = dict[str, bool | int | float | str | None]


def stats_dtype(layers: Sequence[LayerInfo]) -> np.dtype:
    """Payload of a frame of `stats-0001.bin`: counts, forwards, then 9 numbers a layer and quantity."""
    n = len(layers)
    return np.dtype([("count", I8, (n,)), ("forwards", I4, (n,)), ("stats", F4, (n, len(QUANTITIES), len(COLUMNS)))])


def vector_starts(layers: Sequence[LayerInfo], quantities: int) -> np.ndarray:
    """Where each layer's (quantities, channels) block starts, in float32s; last, the length of all."""
    lengths = [0] + [quantities * layer.channels for layer in layers]
    return np.cumsum(lengths, dtype=np.int64)


def spread(channels: int, most: int) -> np.ndarray:
    """All channels, or so many of them, evenly spaced from the first to the last: ascending, int64.

    Example:
        >>> spread(3, 128).tolist(), spread(9, 5).tolist()
        ([0, 1, 2], [0, 2, 4, 6, 8])
    """
    kept = min(channels, most)
    return np.arange(channels) if kept == channels else np.arange(kept) * (channels - 1) // max(1, kept - 1)
