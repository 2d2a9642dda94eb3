"""accumulate(): the micro-batches of one step, tracked as one batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import lonely_block
from ..mixin import BatchNorm, Mixin, mix_in, option, take_out
from ..model.find import find
from ..model.given import moments_given
from ..moments import Moments
from ..nn.layer import BatchNormLayer as Ours
from ..nn.layer import next_momentum
from ..nn.options import options_of
from ..nn.recompute import recomputing
from ..ops.collective import several
from ..pipeline import Running, Tracking, moments_of, track, under_transform
from .lone import is_lone, normalize_by
from .update import tracking


@contextmanager
def accumulate(model: nn.Module) -> Iterator[None]:
    """Pool what the batch-norm layers measure in the block, and track it as one batch at the block's end.

        running = (1 - momentum) * running + momentum * (of the union of all batches in the block)

    For gradient accumulation: k micro-batches then move the running statistics as one batch of their union would.
    Momentum is applied once, the variance is that of the union (Moments merge exactly), and num_batches_tracked grows
    by one. Each micro-batch is still normalized with its own mean and variance, and gets the gradients of that; pooling
    cannot make k micro-batches compute what one large batch would. A micro-batch with one value per channel has no
    variance: it is normalized by what the block has pooled so far, itself included, or by the running statistics if it
    is the first.

    If the block raises, nothing is tracked. A layer is left alone if it did not run in train mode, or ran inside an
    inner `no_update` block. In nested blocks the outermost one counts. A recomputation by activation checkpointing is
    not counted again; with torch.nn's layers, keep the backward inside the block.

    Args:
        model: any module, or a batch-norm layer itself; torch.nn's layers or ours.

    Raises:
        ValueError: a lazy layer has not seen an input yet; or a layer saw a single value per channel in the whole
            block.
        TypeError: not a module.
        NotImplementedError: a torch.nn.SyncBatchNorm in several processes; or a forward inside a torch.func transform.

    Example:
        >>> layer = nn.BatchNorm1d(1, momentum=1.0)
        >>> with accumulate(layer):
        ...     for micro_batch in torch.tensor([[[1.0], [2.0]], [[3.0], [6.0]]]):
        ...         y = layer(micro_batch)
        >>> layer.running_mean.item(), round(layer.running_var.item(), 4), layer.num_batches_tracked.item()
        (3.0, 4.6667, 1)
    """
    layers = [layer for layer in tracking(model) if not isinstance(layer, Pooling)]
    for layer in layers:
        if isinstance(layer, nn.SyncBatchNorm) and not isinstance(layer, Ours) and several(None):
            raise NotImplementedError(
                "accumulate cannot pool what torch.nn.SyncBatchNorm measures over processes, and without that their "
                "running statistics would diverge; use bn.convert(model, sync=True)"
            )
    for layer in layers:
        mix_in(layer, Pooling)
    try:
        yield
    finally:
        pooled = [(layer, layer.__dict__.get("_pooled")) for layer in layers if not layer._lone]
        lone = [layer for layer in layers if layer._lone and option(layer, "singleton", "raise") == "raise"]
        for layer in layers:
            for name in _OF_THE_BLOCK:
                layer.__dict__.pop(name, None)
            take_out(layer, Pooling)
    if lone:
        raise lonely_block(next(each.called for each in find(model) if each.layer is lone[0]))
    for layer, moments in pooled:
        if moments is not None:
            _track(layer, moments)


class Pooling(Mixin):
    """A layer that pools what it measures instead of tracking it."""

    _copied = False
    _pooled: Moments | None = None
    _lone: bool = False  # whether the pool is a single value per channel
    _statistics: Tensor | None = None  # what a layer of ours has measured in this call
    track_running_stats: bool
    eps: float

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not (self.training and self.track_running_stats) or recomputing():
            return self._forward_untracked(input, *args, **kwargs)
        if under_transform():
            raise NotImplementedError(
                "accumulate cannot pool what a layer measures inside a torch.func transform; use only one of the two"
            )
        given = (input, *args)
        if is_lone(self, given, kwargs):
            moments = moments_given(self, given, kwargs)
            pool = moments if self._pooled is None else self._pooled.merge(moments)
            first = self._pooled is None
            y = normalize_by(None if first else pool, self, super().forward, *given, **kwargs)
            self._lone, self._pooled = first, pool
            return y
        self._statistics = None
        y = self._forward_untracked(*given, **kwargs)
        if not isinstance(self, Ours):
            self._pool(moments_given(self, given, kwargs))
        elif self._statistics is not None:
            self._pool(moments_of(self._statistics))
        return y

    def _forward_untracked(self, *args: Any, **kwargs: Any) -> Tensor:
        tracks = self.track_running_stats
        self.track_running_stats = False
        try:
            return super().forward(*args, **kwargs)
        finally:
            self.track_running_stats = tracks

    def _batchnorm_remember(self, statistics: Tensor, tracked: bool) -> None:
        super()._batchnorm_remember(statistics, tracked)  # pyright: ignore[reportAttributeAccessIssue]
        self._statistics = statistics

    def _pool(self, moments: Moments) -> None:
        self._lone = False
        self._pooled = moments if self._pooled is None else self._pooled.merge(moments)

    def __getstate__(self) -> dict[str, Any]:
        # The pool belongs to the block, not to a copy. (Python 3.10 has no object.__getstate__ to call.)
        state = getattr(super(), "__getstate__", self.__dict__.copy)()
        return {name: value for name, value in state.items() if name not in _OF_THE_BLOCK}


_OF_THE_BLOCK = ("_pooled", "_lone", "_statistics")


@torch.no_grad()
def _track(layer: BatchNorm, moments: Moments) -> None:
    seen, momentum = layer.num_batches_tracked, next_momentum(layer)
    running = Running(layer.running_mean, layer.running_var)
    if isinstance(layer, Ours):
        options = options_of(layer)
        statistics = track(running, moments, Tracking(momentum, options.unbiased, options.nonfinite))
        layer._batchnorm_remember(statistics, tracked=True)
    else:
        track(running, moments, Tracking(momentum))
    if seen is not None:
        seen.add_(1)
