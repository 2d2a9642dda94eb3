"""What a run holds: names of files and quantities, a layer's facts, and the bytes of each kind of record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

FORMAT = 1
RUN = "run.json"
STATS, VECTORS, PROBES = "stats-0001.bin", "vectors-0001.bin", "probes-0001.bin"
SCALARS, ALERTS = "scalars.jsonl", "alerts.jsonl"

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
COLUMNS = ("min", "p05", "p25", "p50", "p75", "p95", "max", "mean", "nonfinite")

# Little-endian on every machine, so that a run can be read where it was not written.
F4, I4, I8 = np.dtype("<f4"), np.dtype("<i4"), np.dtype("<i8")


@dataclass(frozen=True)
class LayerInfo:
    """One watched layer, as it was when the watching began."""

    name: str
    kind: str
    channels: int
    eps: float
    momentum: float | None
    affine: bool
    tracks: bool

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> LayerInfo:
        """The layer that `facts` describes; ValueError when a fact is missing or of the wrong kind."""
        try:
            momentum = facts["momentum"]
            layer = cls(
                name=str(facts["name"]),
                kind=str(facts["kind"]),
                channels=int(facts["channels"]),
                eps=float(facts["eps"]),
                momentum=None if momentum is None else float(momentum),
                affine=bool(facts["affine"]),
                tracks=bool(facts["tracks"]),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"a layer needs {', '.join(cls.__dataclass_fields__)}; got {facts!r}") from error
        if layer.channels < 1:
            raise ValueError(f"layer {layer.name!r} must have at least 1 channel, got {layer.channels}")
        return layer


def stats_dtype(layers: Sequence[LayerInfo]) -> np.dtype:
    """Payload of a frame of `stats-0001.bin`: counts, forwards, then 9 numbers a layer and quantity."""
    n = len(layers)
    return np.dtype([("count", I8, (n,)), ("forwards", I4, (n,)), ("stats", F4, (n, len(QUANTITIES), len(COLUMNS)))])


def vector_starts(layers: Sequence[LayerInfo], quantities: int) -> np.ndarray:
    """Where each layer's (quantities, channels) block starts, in float32s; last, the length of all."""
    lengths = [0] + [quantities * layer.channels for layer in layers]
    return np.cumsum(lengths, dtype=np.int64)
