"""What several batches measure at the same weights: the model is run on them, and left exactly as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
from torch import nn

from ..model.given import HandedOver, given, moments_measured
from ..model.run import call as run_model
from ..model.run import undisturbed
from ..moments import Moments
from ..runs.histogram import encode, kept_channels
from ..runs.schema import F4, HISTOGRAM_BATCHES, HISTOGRAM_BINS, LayerInfo
from .histograms import count


@np.errstate(all="ignore")
def probe(
    model: nn.Module,
    layers: Sequence[tuple[LayerInfo, nn.Module]],
    batches: Iterable[Any],
    call: Callable[[nn.Module, Any], Any] | None,
) -> tuple[np.ndarray, bytes]:
    """Mean and biased variance that every layer normalizes each batch with: of all ranks' where they are synchronized.

    Returns:
        (batches, sum of 2 * channels) float32: a layer after the other, its mean and then its variance; NaN for a layer
        that did not run. And the histograms of the first batches: a frame's payload.
    """
    run = call or run_model
    probed = [_Probed(info, layer) for info, layer in layers]
    rows, histograms = [], []
    with ExitStack() as stack:
        stack.enter_context(undisturbed(model))
        if not model.training:
            model.train()
        for (_, layer), each in zip(layers, probed, strict=True):
            handle = layer.register_forward_hook(each, with_kwargs=True)
            stack.callback(handle.remove)
        for batch in batches:
            counted = len(rows) < HISTOGRAM_BATCHES
            for each in probed:
                each.begin(counted)
            run(model, batch)
            rows.append([each.pooled() for each in probed])
            histograms += [encode(each.counts) for each in probed] if counted else []
    if not rows:
        raise ValueError("batches must hold at least one batch, but are empty")
    values = np.array([np.concatenate([np.empty(0), *(pair.ravel() for pair in row)]) for row in rows], F4)
    return values, b"".join(histograms)


class _Probed:
    """The forward hook of one layer: what it measured of the batch under way, and how that is spread."""

    def __init__(self, info: LayerInfo, layer: nn.Module) -> None:
        self._info, self._kept = info, kept_channels(info)
        self._handed = HandedOver(layer)
        self.begin(True)

    def begin(self, counted: bool) -> None:
        """A batch begins, of which histograms are wanted or not."""
        self._moments: list[Moments] = []
        self._counted = counted
        self.counts = np.zeros((len(self._kept), HISTOGRAM_BINS), np.int64)

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        if layer.training:
            measured = moments_measured(layer, args, kwargs, self._handed)
            if measured is not None:
                self._moments.append(measured)
                if self._counted:
                    self.counts += count(given(layer, args, kwargs), measured, self._info.eps, self._kept)

    def pooled(self) -> np.ndarray:
        """Mean and variance, (2, C), of all that the layer saw of the batch."""
        if not self._moments:
            return np.full((2, self._info.channels), np.nan)
        union = self._moments[0].merge(*self._moments[1:])
        pair = np.stack([union.mean.numpy(force=True), union.variance().numpy(force=True)])
        return np.where(union.count.numpy(force=True) > 0, pair, np.nan)
