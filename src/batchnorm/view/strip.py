"""What the channel strip shows: γ and β of all channels of each layer, or as many as fit, at a few recorded steps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from .facts import BELOW, NEAR_ZERO
from .select import nearest, thin

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .select import Selection

STRIP_VALUES = 24_000  # float32 values, all layers, channels and steps together: 128 kB in base64
MOST_CHANNELS, STEPS = 200, 4


@dataclass(frozen=True)
class Strip:
    """One layer at the steps of the strip.

    Attributes:
        channels: (c,) which channels, ascending: all, or evenly down the ranking by |γ| at the first look's step, and
            those that the first screen can show.
        gamma, beta: (S, c).
        near_zero: (S,) how many of all channels have |γ| below `NEAR_ZERO`.
        shut: (S,) how many of the others have β below -`BELOW` |γ|.
    """

    channels: NDArray[np.int64]
    gamma: NDArray[np.float32]
    beta: NDArray[np.float32]
    near_zero: NDArray[np.int64]
    shut: NDArray[np.int64]


@dataclass(frozen=True)
class Strips:
    """The strip of each layer, None where it has no γ and β; and the steps, those of the page nearest to even ones."""

    steps: NDArray[np.int64]
    layers: list[Strip | None] = field(default_factory=list)


def strips(selection: Selection, look: int) -> Strips:
    """Return the channel strips of a run at `STEPS` of the steps that the page shows, and at the step `look`."""
    if not len(selection.steps):
        return Strips(selection.steps)
    rows = np.union1d(thin(len(selection.steps), STEPS), nearest(selection.steps, look))
    steps = selection.steps[rows]
    learn = max(1, sum(view.info.affine for view in selection.layers))
    most = int(np.clip(STRIP_VALUES // (2 * len(steps) * learn), 10, MOST_CHANNELS))
    at = nearest(steps, look)
    run, found = selection.run, []
    for view in selection.layers:
        if not view.info.affine:
            found.append(None)
            continue
        gamma, beta = (_at(*run.vectors(view.info.name, quantity), steps) for quantity in ("gamma", "beta"))
        size = np.abs(gamma)
        near_zero = size < NEAR_ZERO
        ranked = np.argsort(size[at], kind="stable")
        channels = np.union1d(ranked[thin(len(ranked), most)], view.channels)
        with np.errstate(invalid="ignore", over="ignore"):
            shut = ~near_zero & (beta < -BELOW * size)
        found.append(Strip(channels, gamma[:, channels], beta[:, channels], near_zero.sum(1), shut.sum(1)))
    return Strips(steps, found)


def _at(have: NDArray[np.int64], values: NDArray[np.float32], want: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return the rows of steps that are surely there."""
    return values[np.searchsorted(have, want)]
