"""recalibrate(): running statistics that are exactly those of the data, and a table of how far they were off."""

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

        running_mean = mean of all the layer is given;  running_var = its unbiased variance

    Moments are pooled over all batches and merge exactly: uneven batches weigh as much as they hold, the spread between
    batches is part of the variance, and a mean of 1e4 loses nothing. For after averaging weights (SWA, EMA), pruning,
    quantization, on data of another kind, or whenever running statistics are not to be trusted. Some 10^3 to 10^4
    samples are enough.

    A layer is left alone, and normalizes as in eval, if it is frozen (`freeze`), or in eval mode inside a model in
    train mode, which is freezing by hand, or does not track. All other modules are in eval mode meanwhile, dropout too.
    Modes, parameters, gradients and hooks are afterwards as they were; if anything raises, running statistics are too.

    What a layer is given depends on how the layers before it normalize:

    - By default as in training, each with the batch: one pass. The first layer's statistics are those of the data,
      however it is cut; those of deeper layers are what training sees with batches like these. So use batches as large
      as in training, or larger, and shuffled. A batch of one value a channel, as the last one may be, counts as any; it
      is normalized by all that has been seen so far.
    - With `exact`, as in eval: passes are repeated until no layer's statistics move, which takes at most as many as
      there are layers, one after the other. Then eval normalizes every layer by the statistics of exactly what it is
      given there, however the data is cut. (A layer that runs more than once in a forward may still move a little.)

    Several ranks' batches count as one set: each rank passes its own, any number of them. Ranks that synchronize their
    layers in training do so here too, unless `exact`, and then need equally many batches.

    Args:
        model: any module, or a batch-norm layer itself; torch.nn's layers or ours. In DistributedDataParallel, its
            module is called.
        batches: one after the other, as of a DataLoader. A tensor is what the model is called with; of a tuple or list
            the first element is; a mapping holds keyword arguments. `exact` goes over them several times: not an
            iterator.
        call: `call(model, batch)` for batches of another kind, on another device, under autocast.
        max_batches: stop after so many (on each rank).
        exact: see above.
        only: "nonfinite": set only channels whose running mean or variance is NaN, infinite or negative.
        sync: merge over the ranks of `process_group` (None: all processes), if torch.distributed is initialized; with
            False each rank has its own.

    Returns:
        A table of how far off the running statistics were, layer by layer, with `undo()` and `to_dict()`.
        num_batches_tracked has grown by the number of batches, of all ranks; with `only` it has not.

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
    """`recalibrate`; what is there already counts as `prior` items beside those of the batches."""
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
            # Every layer is written before any is judged: all ranks judge the same, and go over the batches as often.
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
    """Raise a ValueError for an iterator, which is empty after the first time."""
    if isinstance(batches, Iterator):
        raise ValueError(
            f"{what} goes over the batches several times, but got an iterator: pass a list or a DataLoader"
        )


class _Change:
    """What one layer's running statistics were, and what becomes of them."""

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
        """The channels that are set: those wanted, of which there was any value."""
        return self._wanted & (self.pooled.moments.count > 0)

    def measured(self) -> tuple[Tensor, Tensor]:
        """Mean and variance, (C,) each, as the layer tracks them."""
        moments = self.pooled.moments
        return moments.mean, moments.variance(unbiased=option(self.layer, "unbiased", True))

    @torch.no_grad()
    def apply(self, pooled: Pooled) -> bool:
        """Write the running statistics; whether what was measured differs from the last time."""
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
            raise RuntimeError(f"{self.name or 'the layer'} has seen one value a channel, which has no variance")
        sound = torch.stack([running.isfinite().cpu() for running in self._running]).all(0)
        channels = (self.written & ~sound).nonzero().flatten().tolist()
        if channels:
            raise RuntimeError(
                f"{self.name or 'the layer'} measured NaN or infinite values in {len(channels)} of "
                f"{mean.numel()} channels (the first: {channels[:5]}); the running statistics are as they were. Look "
                "for a batch with NaN, or for the layer before this one that overflows"
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
