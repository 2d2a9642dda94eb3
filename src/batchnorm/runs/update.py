"""Worked steps: gamma and beta before and after one step, and everything the optimizer used to compute it."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np

from .journal import Frames
from .parse import typed
from .schema import F4, I4, LEARNED, MOST_UPDATED, OPTIMIZERS, UPDATES, Finite, LayerInfo, spread

MOST_OPTION = sys.float_info.max  # an integer beyond is no float
# Of each gamma and beta: before, gradient, after, and as many tensors of the optimizer's state as any known rule has.
ROWS = 6
STATES = {
    "SGD": ("momentum_buffer",),
    "Adam": ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    "AdamW": ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
}


@dataclass(frozen=True)
class Change:
    """How the optimizer changed gamma, or beta, in one step.

    Attributes:
        before: (c,) float32, as the forward used it.
        gradient: (c,) float32, as the optimizer got it: clipped, reduced, unscaled.
        after: (c,) float32.
        state: the optimizer's tensors before the step, by torch's names, (c,) float32 each: momentum_buffer of SGD;
            exp_avg, exp_avg_sq and max_exp_avg_sq of Adam and AdamW. A first step has none yet.
        optimizer: its class, such as "SGD"; of one that is not torch's with its module, "timm.optim.lars.Lars".
        options: those of its parameter group: lr, momentum, weight_decay, beta1, beta2, eps, ...
        steps: how many it had taken with this parameter before, where it counts them; else 0.
        skipped: a gradient scaler found gradients that are not finite, and the optimizer left everything as it was.
        dtype: of the parameter, such as "float32": what `after` is rounded to.
    """

    before: np.ndarray
    gradient: np.ndarray
    after: np.ndarray
    state: dict[str, np.ndarray]
    optimizer: str
    options: dict[str, float | bool]
    steps: float
    skipped: bool
    dtype: str


@dataclass(frozen=True)
class Update:
    """One step of the optimizer, for one layer.

    Attributes:
        step: the training step.
        channels: (c,) int64: which channels were kept, ascending; all, unless the layers have many thousands.
        gamma, beta: how each changed; None if the optimizer did not update it: it is frozen, has no gradient, or the
            layer does not have it.
    """

    step: int
    channels: np.ndarray
    gamma: Change | None
    beta: Change | None


Number = bool | float  # 0 for False is what people write


class _Options(TypedDict, total=False):
    """The options that any rule reads."""

    lr: Number
    momentum: Number
    dampening: Number
    weight_decay: Number
    nesterov: Number
    maximize: Number
    beta1: Number
    beta2: Number
    eps: Number
    amsgrad: Number
    decoupled_weight_decay: Number


class _Facts(TypedDict, total=False):
    """What a line of optimizers.jsonl says beside the options."""

    step: int
    optimizer: str
    state: str
    steps: Finite
    skipped: bool
    dtype: str


class _Line(_Facts, _Options, total=False):
    """A line of optimizers.jsonl, as far as anybody here reads it."""


STATE_NAMES = tuple(dict.fromkeys(name for names in STATES.values() for name in names))
OPTION_NAMES = tuple(_Options.__annotations__)
Row = tuple[int, Sequence[np.ndarray], Mapping[str, Any]]  # index in LEARNED, arrays as in `Change`, facts and options


def kept_channels(layers: Sequence[LayerInfo]) -> list[np.ndarray]:
    """The channels of each layer that worked steps are kept of: all, or evenly thinned ones where they are many."""
    widths = np.array([layer.channels for layer in layers], np.int64)
    low, high = 0, int(widths.max(initial=0))
    while low < high:  # the largest number a layer with which all fit
        middle = (low + high + 1) // 2
        low, high = (middle, high) if np.minimum(widths, middle).sum() <= MOST_UPDATED else (low, middle - 1)
    return [spread(int(width), low) for width in widths]


def payload_bytes(layers: Sequence[LayerInfo]) -> int:
    """Length of a frame of `updates-0001.bin`."""
    kept = kept_channels(layers)
    return len(LEARNED) * (len(kept) * I4.itemsize + sum(map(len, kept)) * ROWS * F4.itemsize)


def encode(step: int, kept: Sequence[np.ndarray], changes: Sequence[Sequence[Row]]) -> tuple[bytes, list[Any]]:
    """The payload of a frame, and the lines of optimizers.jsonl that it refers to.

    Args:
        step: the training step.
        kept: from `kept_channels`.
        changes: for each layer the gamma and beta that moved: arrays of all its channels.
    """
    lines: dict[tuple[Any, ...], int] = {}
    which = np.full((len(kept), len(LEARNED)), -1, I4)
    blocks = []
    for i, (channels, of_layer) in enumerate(zip(kept, changes, strict=True)):
        block = np.full((len(LEARNED), ROWS, len(channels)), np.nan, F4)
        for q, arrays, facts in of_layer:
            # True and 1 are one key, but two lines
            key = tuple((name, type(value), value) for name, value in facts.items())
            which[i, q] = lines.setdefault(key, len(lines))
            for row, values in zip(block[q], arrays, strict=False):
                row[:] = values[channels]
        blocks.append(block.tobytes())
    rows = [{"step": step, **{name: value for name, _, value in key}} for key in lines]
    return which.tobytes() + b"".join(blocks), rows


class Updates:
    """The worked steps of a run, from its two files.

    Args:
        layers: of the run.
        frames: of `updates-0001.bin`.
        rows: of `optimizers.jsonl`.
    """

    def __init__(self, layers: Sequence[LayerInfo], frames: Frames, rows: Sequence[dict[str, Any]]) -> None:
        self._kept, self._frames = kept_channels(layers), frames
        self._lines: dict[int, list[dict[str, Any]]] = {}
        self.damage: str | None = None
        for row in rows:
            try:
                typed(row, _Line)
            except ValueError as error:
                self.damage = f"{OPTIMIZERS}: step {row['step']}: {error}"
                break
            self._lines.setdefault(row["step"], []).append(row)
        widths = [len(channels) for channels in self._kept]
        self._starts = np.cumsum([0, *widths]) * len(LEARNED) * ROWS * F4.itemsize
        for k, step in enumerate(frames.steps.tolist()):
            if self.damage is None and self._which(k).max(initial=-1) >= len(self._lines.get(step, [])):
                self.damage = f"{UPDATES}: {OPTIMIZERS} lacks lines of step {step}; their updates are left out"

    def of(self, i: int) -> list[Update]:
        """Those of the i-th layer, a step after the other."""
        updates = []
        for k, step in enumerate(self._frames.steps.tolist()):
            which = self._which(k)[i]
            start = self._which(k).nbytes + int(self._starts[i])
            shape = len(LEARNED), ROWS, len(self._kept[i])
            block = np.frombuffer(self._frames.payload(k), F4, int(np.prod(shape)), start).reshape(shape)
            gamma, beta = (self._change(step, int(line), rows) for line, rows in zip(which, block, strict=True))
            if gamma or beta:
                updates.append(Update(step, self._kept[i], gamma, beta))
        return updates

    def _which(self, k: int) -> np.ndarray:
        """The line of each layer's gamma and beta among those of the step, -1 for none."""
        n = len(self._kept)
        return np.frombuffer(self._frames.payload(k), I4, n * len(LEARNED)).reshape(n, len(LEARNED))

    def _change(self, step: int, line: int, rows: np.ndarray) -> Change | None:
        lines = self._lines.get(step, [])
        if not 0 <= line < len(lines):
            return None
        facts = lines[line]
        names = facts.get("state", "").split()[: ROWS - 3]
        return Change(
            before=rows[0],
            gradient=rows[1],
            after=rows[2],
            state=dict(zip(names, rows[3:], strict=False)),
            optimizer=facts.get("optimizer", ""),
            options={
                name: value
                for name, value in facts.items()
                if name not in _Facts.__annotations__
                and isinstance(value, (int, float))
                and not abs(value) > MOST_OPTION
            },
            steps=facts.get("steps", 0),
            skipped=facts.get("skipped", False),
            dtype=facts.get("dtype", ""),
        )
