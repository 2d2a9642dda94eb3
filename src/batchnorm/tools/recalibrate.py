"""recalibrate(): set running statistics exactly to those of the data, and report how far off they were."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ..mixin import BatchNorm, option
from ..model.find import find, find_or_warn
from ..model.run import Call, unwrapped
from ..model.run import call as run_model
from .drift import Drift, Recalibration, distance
from .population import Pooled, Ranks, Saved, layers_of, population

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def recalibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    call: Call | None = None,
    max_batches: int | None = None,
    exact: bool = False,
    only: Literal["nonfinite"] | None = None,
    sync: bool = True,
    process_group: ProcessGroup | None = None,
) -> Recalibration:
    """Set every batch-norm layer's running statistics to those of the data, in place.

        running_mean = mean of all the layer's inputs;  running_var = their unbiased variance

    Moments are pooled over all batches and merge exactly: each batch weighs as much as it has samples, the spread
    between batches is part of the variance, and a mean of 1e4 costs no accuracy. Use it after averaging weights (SWA,
    EMA), after pruning or quantization, on data unlike the training data, or whenever you do not trust the running
    statistics. Some 10^3 to 10^4 samples are enough.

    A layer is left alone, and normalizes as in eval, if it is frozen (`freeze`), if it does not track, or if it is in
    eval mode inside a model in train mode, which is freezing by hand. All other modules are in eval mode in the
    meantime, dropout too. Modes, parameters, gradients and hooks are restored; if anything raises, so are the running
    statistics.

    The input of a layer depends on how the layers before it normalize:

    - By default they normalize with the batch, as in training. This takes one pass. The first layer's statistics are
      those of the data, however it is cut into batches; those of deeper layers are what training sees with such
      batches. So use shuffled batches, at least as large as in training. A batch with one value per channel counts like
      any other; it is normalized by everything seen so far.
    - With `exact` they normalize as in eval: passes are repeated until no layer's statistics change, at most once per
      layer of the longest chain. Every layer then has the statistics of exactly the input that it gets in eval, however
      the data is cut. (A layer that runs more than once per forward may still move a little.)

    The batches of several ranks count as one set: each rank passes its own, any number of them. Ranks with synchronized
    layers synchronize here too, unless `exact` is set, and then every rank needs the same number of batches.

    Args:
        model: any module, or a batch-norm layer itself; torch.nn's layers or ours. Of a model in
            DistributedDataParallel, the inner module is called.
        batches: an iterable such as a DataLoader. A batch is the model's input (a tensor), a tuple or list that starts
            with it, or a mapping of keyword arguments. `exact` needs several passes: pass a list or DataLoader, not an
            iterator.
        call: `call(model, batch)`, for other kinds of batches, another device, or autocast.
        max_batches: the largest number of batches to use (on each rank).
        exact: see above.
        only: "nonfinite": set only channels whose running mean or variance is NaN, infinite or negative.
        sync: merge over the ranks of `process_group` (None: all processes), if torch.distributed is initialized. With
            False each rank has its own statistics.

    Returns:
        A table of how far off the running statistics were, layer by layer, with `undo()` and `to_dict()`.
        num_batches_tracked grows by the number of batches of all ranks, except with `only`.

    Raises:
        ValueError: no batches; an iterator with `exact`; a lazy layer has not seen an input yet.
        TypeError: one tensor or mapping in place of batches.
        RuntimeError: what a layer measured is not finite, or another rank raised.

    Source: Wu & Johnson 2021, "Rethinking 'Batch' in BatchNorm", 3: precise statistics.

    Example:
        >>> model = nn.Sequential(nn.BatchNorm1d(1), nn.Linear(1, 2), nn.Dropout())
        >>> batches = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[6.0], [13.0]])
        >>> result = bn.recalibrate(model, batches)
        >>> model[0].running_mean.item(), model[0].running_var.item()
        (5.0, 23.5)
        >>> round(result.layers[0].mean.item(), 2)
        -1.03
    """
    if only not in (None, "nonfinite"):
        raise ValueError(f'only must be "nonfinite", or None for all channels, but got {only!r}')
    return update_statistics(model, batches, call, max_batches, exact, only is not None, Ranks(sync, process_group))


def update_statistics(
    model: nn.Module,
    batches: Iterable[Any],
    call: Call | None,
    max_batches: int | None,
    exact: bool,
    only_nonfinite: bool,
    ranks: Ranks,
    prior: float = 0.0,
) -> Recalibration:
    """As `recalibrate`, but the existing statistics count as `prior` items besides those of the batches."""
    if max_batches is not None and max_batches < 1:
        raise ValueError(f"max_batches must be positive, or None for all, but got {max_batches}")
    if exact:
        require_repeatable(batches, "exact=True")
    model = unwrapped(model)
    layers, others = layers_of(model)
    if not layers:
        find_or_warn(model, "recalibrate", stacklevel=3)
        return _report(model, {}, others, [], 0, Saved((), parameters=False))
    saved = Saved(layers.values(), parameters=False)
    changes = [_Change(name, layer, only_nonfinite, prior) for name, layer in layers.items()]
    passes = 0
    try:
        while passes < (len(layers) if exact else 1):
            passes += 1
            pools = population(model, layers, batches, call or run_model, max_batches, not exact, ranks)
            moved = [change.apply(pools[change.name]) for change in changes]
            # Every layer is written before any is checked, so that all ranks decide alike and make the same number of
            # passes.
            if not any(moved):
                break
        for change in changes:
            change.check()
    except BaseException:
        saved.restore()
        raise
    for change in changes:
        if change.layer.num_batches_tracked is not None and not only_nonfinite:
            change.layer.num_batches_tracked.add_(change.pooled.calls)
    return _report(model, layers, others, changes, passes, saved)


def require_repeatable(batches: Iterable[Any], what: str) -> None:
    """Raise a ValueError for an iterator, which is empty after one pass."""
    if isinstance(batches, Iterator):
        raise ValueError(
            f"{what} needs several passes over the batches, but got an iterator: pass a list or a DataLoader"
        )


class _Change:
    """The old and new running statistics of one layer."""

    pooled: Pooled

    def __init__(self, name: str, layer: BatchNorm, only_nonfinite: bool, prior: float) -> None:
        assert layer.running_mean is not None
        assert layer.running_var is not None
        self.name, self.layer, self._prior = name, layer, prior
        self._running = layer.running_mean, layer.running_var
        self.mean, self.variance = (running.to("cpu", torch.float64, copy=True) for running in self._running)
        self._broken = ~(self.mean.isfinite() & self.variance.isfinite() & (self.variance >= 0))
        self._wanted = self._broken if only_nonfinite else torch.ones_like(self._broken)
        self._measured: tuple[Tensor, Tensor] | None = None

    @property
    def written(self) -> Tensor:
        """The channels to set: those that are wanted and had any value."""
        return self._wanted & (self.pooled.moments.count > 0)

    def measured(self) -> tuple[Tensor, Tensor]:
        """Mean and variance, (C,) each, as the layer tracks them."""
        moments = self.pooled.moments
        return moments.mean, moments.variance(unbiased=option(self.layer, "unbiased", True))

    @torch.no_grad()
    def apply(self, pooled: Pooled) -> bool:
        """Write the running statistics; return whether they differ from the last pass."""
        self.pooled = pooled
        measured, last = self.measured(), self._measured
        self._measured = measured
        share = pooled.items / (pooled.items + self._prior) if pooled.items else 0.0
        for running, before, now in zip(self._running, (self.mean, self.variance), measured, strict=True):
            new = now if share == 1.0 else before + (now - before) * share
            running.copy_(torch.where(self.written, new, before))
        if last is None:
            return True
        drift, log_variance = distance(*last, *measured, self.layer.eps)
        tolerance = 16 * torch.finfo(self._running[0].dtype).eps
        still = (drift.abs() <= tolerance) & (log_variance.abs() <= tolerance)
        return not bool((still | (pooled.moments.count == 0)).all())

    def check(self) -> None:
        """Raise unless what has been written is finite."""
        mean, variance = self.measured()
        if bool((self.written & variance.isnan() & mean.isfinite() & (self.pooled.moments.count < 2)).any()):
            raise RuntimeError(
                f"{self.name or 'the layer'} has seen only one value per channel, which has no variance: pass more data"
            )
        sound = torch.stack([running.isfinite().cpu() for running in self._running]).all(0)
        channels = (self.written & ~sound).nonzero().flatten().tolist()
        if channels:
            raise RuntimeError(
                f"{self.name or 'the layer'} measured NaN or infinite values in {len(channels)} of "
                f"{mean.numel()} channels (the first: {channels[:5]}); the running statistics are as they were. Look "
                "for a batch with NaN, or for an earlier layer that overflows"
            )

    def drift(self) -> Drift:
        """How far off it was."""
        channels, count, broken = self.mean.numel(), self.pooled.moments.count, int(self._broken.sum())
        if not bool((count > 0).any()):
            return Drift(self.name, "did not run", channels, nonfinite=broken)
        mean, log_variance = distance(self.mean, self.variance, *self.measured(), self.layer.eps)
        written = int(self.written.sum())
        state = "recalibrated" if written else "nothing non-finite"
        return Drift(self.name, state, channels, written, int(count.min()), broken, mean, log_variance)


def _report(
    model: nn.Module,
    layers: dict[str, BatchNorm],
    others: dict[str, str],
    changes: list[_Change],
    passes: int,
    saved: Saved,
) -> Recalibration:
    channels = {found.name: found.adapter.channels(found.layer) for found in find(model)}
    drifts = {change.name: change.drift() for change in changes}
    for name, state in others.items():
        drifts[name] = Drift(name, state, channels[name])
    return Recalibration([drifts[name] for name in channels if name in drifts], passes, saved)
