"""How the normalized values of a batch are spread: counts over equal bins, for some channels."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..model.given import Given
from ..moments import Moments, broadcast_mask, per_channel
from ..runs.schema import HISTOGRAM_BINS, HISTOGRAM_EDGES

_BLOCK = 1 << 18  # values that are worked on at once, in float64: they stay in the cache
_FIRST, _LAST = float(HISTOGRAM_EDGES[0]), float(HISTOGRAM_EDGES[-1])
_A_UNIT = HISTOGRAM_BINS / (_LAST - _FIRST)


@torch.no_grad()
def count(given: Given, moments: Moments, eps: float, kept: np.ndarray) -> np.ndarray:
    """Counts of (x - mean) / sqrt(var + eps) over the bins between `HISTOGRAM_EDGES`, the end bins without end.

    Args:
        given: x (N, C, *), and its mask.
        moments: what the call has normalized with.
        eps: of the layer.
        kept: (c,) the channels that are counted.
    Returns:
        (c, bins) int64. What is masked does not count, nor what is not finite: its mean is then not finite either, and
        nothing of the channel counts, unless the layer passes such values over.
    """
    x, mask = given
    std = (moments.variance() + eps).sqrt()
    measured = std.isfinite() & (moments.count > 0)
    std = torch.where(measured, std, torch.nan)  # so that nothing of such a channel counts
    channels = torch.as_tensor(kept, device=x.device)
    block = max(1, _BLOCK * x.size(1) // max(1, x.numel()))
    return np.concatenate(
        [
            _count(x.index_select(1, some), mask, moments.mean[some], std[some]).numpy(force=True)
            for some in channels.split(block)
        ]
    )


def _count(x: Tensor, mask: Tensor | None, mean: Tensor, std: Tensor) -> Tensor:
    shape = per_channel(x)
    # The bins' width is a power of two: multiplying by its inverse rounds nothing.
    at = x.double().sub_(mean.view(shape)).div_(std.view(shape)).mul_(_A_UNIT).floor_()
    counts = at.isfinite()
    if mask is not None:
        counts &= broadcast_mask(mask, x)
    at = at.clamp_(_FIRST * _A_UNIT, _LAST * _A_UNIT - 1).sub_(_FIRST * _A_UNIT)
    at.masked_fill_(~counts, HISTOGRAM_BINS)  # a bin of their own, which is left out
    at += torch.arange(x.size(1), device=x.device).view(shape) * (HISTOGRAM_BINS + 1)
    found = torch.bincount(at.flatten().int(), minlength=x.size(1) * (HISTOGRAM_BINS + 1))
    return found.view(-1, HISTOGRAM_BINS + 1)[:, :-1]
