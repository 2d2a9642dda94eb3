"""What several batches measure at the same weights: the model is run on them, and left exactly as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
from torch import nn

from ..model.given import HandedOver, moments_measured
from ..model.run import call as run_model
from ..model.run import undisturbed
from ..moments import Moments
from ..runs.schema import F4, LayerInfo


@np.errstate(all="ignore")
def probe(
    model: nn.Module,
    layers: Sequence[tuple[LayerInfo, nn.Module]],
    batches: Iterable[Any],
    call: Callable[[nn.Module, Any], Any] | None,
) -> np.ndarray:
    """Mean and biased variance that every layer normalizes each batch with: of all ranks' where they are synchronized.

    Returns:
        (batches, sum of 2 * channels) float32: a layer after the other, its mean and then its variance; NaN for a layer
        that did not run.
    """
    run = call or run_model
    seen: list[list[Moments]] = [[] for _ in layers]
    rows = []
    with ExitStack() as stack:
        stack.enter_context(undisturbed(model))
        if not model.training:
            model.train()
        for (_, layer), moments in zip(layers, seen, strict=True):
            handle = layer.register_forward_hook(_measuring(layer, moments), with_kwargs=True)
            stack.callback(handle.remove)
        for batch in batches:
            for moments in seen:
                moments.clear()
            run(model, batch)
            rows.append([_pooled(info, moments) for (info, _), moments in zip(layers, seen, strict=True)])
    if not rows:
        raise ValueError("batches must hold at least one batch, and are empty")
    return np.array([np.concatenate([np.empty(0), *(pair.ravel() for pair in row)]) for row in rows], F4)


def _measuring(layer: nn.Module, moments: list[Moments]) -> Callable[..., None]:
    handed = HandedOver(layer)

    def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        if layer.training:
            measured = moments_measured(layer, args, kwargs, handed)
            if measured is not None:
                moments.append(measured)

    return hook


def _pooled(info: LayerInfo, moments: list[Moments]) -> np.ndarray:
    if not moments:
        return np.full((2, info.channels), np.nan)
    union = moments[0].merge(*moments[1:])
    pair = np.stack([union.mean.numpy(force=True), union.variance().numpy(force=True)])
    return np.where(union.count.numpy(force=True) > 0, pair, np.nan)
