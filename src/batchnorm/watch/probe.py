"""What several batches measure at the same weights: the model is run on them, and left exactly as it was."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..runs.schema import F4, LayerInfo
from .digest import merge
from .hooks import Moment, measure
from .snapshot import Part


@np.errstate(all="ignore")
def probe(
    model: nn.Module,
    layers: Sequence[tuple[LayerInfo, nn.Module]],
    batches: Iterable[Any],
    call: Callable[[nn.Module, Any], Any] | None,
) -> np.ndarray:
    """Mean and biased variance of every layer's input in each batch.

    Returns:
        (batches, sum of 2 * channels) float32: a layer after the other, its mean and then its variance; NaN for a layer
        that did not run.
    """
    call = call or _call
    seen: list[list[Moment]] = [[] for _ in layers]
    rows = []
    with ExitStack() as stack:
        stack.enter_context(_undisturbed(model))
        for (_, layer), moments in zip(layers, seen, strict=True):
            handle = layer.register_forward_hook(_measuring(moments), with_kwargs=True)
            stack.callback(handle.remove)
        for batch in batches:
            for moments in seen:
                moments.clear()
            call(model, batch)
            rows.append([_pool(info, moments) for (info, _), moments in zip(layers, seen, strict=True)])
    if not rows:
        raise ValueError("batches must hold at least one batch, and are empty")
    return np.array([np.concatenate([np.empty(0), *(pair.ravel() for pair in row)]) for row in rows], F4)


def _measuring(moments: list[Moment]) -> Callable[..., None]:
    def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        if layer.training:
            moments.append(measure(args[0] if args else kwargs["input"]))

    return hook


def _pool(info: LayerInfo, moments: list[Moment]) -> np.ndarray:
    pooled, count = np.full((2, info.channels), np.nan), 0
    for moment in moments:
        if moment.first is None or moment.second is None or not isinstance(moment.count, int):
            continue
        pair = np.stack([moment.first.numpy(force=True), moment.second.numpy(force=True)])
        if count == 0:
            pooled, count = pair, moment.count
        else:
            count = merge(pooled, count, pair, Part(moment.way, moment.count), info.eps)
    return pooled


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """The model in train mode, eager, without gradients; then its buffers, flags and random state are as before."""
    modules = list(model.modules())
    flags = [module.training for module in modules]
    # Clones take the buffers' places: the real ones are not even touched, so a backward under way stays valid.
    buffers = [dict(module._buffers) for module in modules]
    devices = {tensor.device.index for tensor in model.parameters() if tensor.device.type == "cuda"}
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(sorted(index or 0 for index in devices)))
        stack.enter_context(torch.no_grad())
        if "torch._dynamo" in sys.modules:  # of a compiled forward the hooks would see nothing
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            if not model.training:
                model.train()
            for module in modules:
                for name, buffer in module._buffers.items():
                    module._buffers[name] = None if buffer is None else buffer.clone()
            yield
        finally:
            for module, flag, originals in zip(modules, flags, buffers, strict=True):
                module.training = flag
                module._buffers.update(originals)


def _call(model: nn.Module, batch: Any) -> Any:
    """The model's output for a batch as data loaders make them: x, (x, ...), or a dict of keyword arguments."""
    parameter = next(model.parameters(), None)

    def place(value: Any) -> Any:
        return value.to(parameter.device) if isinstance(value, Tensor) and parameter is not None else value

    if isinstance(batch, dict):
        return model(**{key: place(value) for key, value in batch.items()})
    return model(place(batch[0] if isinstance(batch, (tuple, list)) else batch))
