"""Pool what batch-norm layers measure over many batches, while the rest of the model is in eval mode."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..mixin import BatchNorm, Mixin, mix_in, take_out
from ..model.adapters.adapter import is_lazy
from ..model.find import find
from ..model.given import moments_given
from ..model.run import Call, each_of
from ..moments import Moments
from ..nn.frozen import Frozen
from ..ops.collective import several
from .lone import is_lone, normalize_by

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Pooled(NamedTuple):
    """What one layer measured: the moments of all its input, the number of calls, and the number of items."""

    moments: Moments
    calls: int
    items: int


class Ranks(NamedTuple):
    """Whether to merge over ranks, and over which process group."""

    sync: bool = True
    group: ProcessGroup | None = None

    def several(self) -> bool:
        """Whether there is another rank to merge with."""
        return self.sync and several(self.group) is not None


def layers_of(model: nn.Module) -> tuple[dict[str, BatchNorm], dict[str, str]]:
    """The batch-norm layers whose running statistics may be set, and for the others the reason why not, by name.

    Raises:
        ValueError: a lazy layer has not seen an input yet.
    """
    layers: dict[str, BatchNorm] = {}
    others: dict[str, str] = {}
    for name, layer, adapter in find(model):
        if is_lazy(layer):
            raise ValueError(
                f"{name or type(layer).__name__} has not seen an input yet: run one batch through the model first"
            )
        if not adapter.learns or (isinstance(layer, Frozen) and "stats" in layer.frozen):
            others[name] = "frozen"
        elif not adapter.tracks(layer) or not layer.track_running_stats:
            others[name] = "does not track"
        elif model.training and not layer.training:
            others[name] = "in eval mode"
        else:
            layers[name] = layer  # pyright: ignore[reportArgumentType]
    return layers, others


class Measuring(Mixin):
    """A layer that pools its inputs, normalizes as it is told to, and tracks nothing."""

    _copied = False
    _by_batch: bool
    _pool: Moments
    _calls: Tensor
    _items: Tensor
    track_running_stats: bool

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        given = (input, *args)
        if self._by_batch and is_lone(self, given, kwargs):
            pool = self._pool.merge(moments_given(self, given, kwargs))
            y = normalize_by(pool, self, super().forward, *given, **kwargs)
        else:
            y = self._forward_untracked(*given, **kwargs)
            pool = self._pool.merge(moments_given(self, given, kwargs))
        self._pool = pool
        self._calls = self._calls + 1
        self._items = self._items + input.size(0)
        return y

    def _forward_untracked(self, *args: Any, **kwargs: Any) -> Tensor:
        # In training only during this call: hooks, such as those that record, see a layer in eval mode.
        self.training, self.track_running_stats = self._by_batch, False
        try:
            return super().forward(*args, **kwargs)
        finally:
            self.training, self.track_running_stats = False, True


@contextmanager
def measuring(model: nn.Module, layers: Iterable[BatchNorm], by_batch: bool) -> Iterator[None]:
    """Put every module in eval mode in the block; the layers pool their inputs and track nothing.

    Everything is restored at the end. Modes are set as attributes, because the model may override train().

    Args:
        model: any module.
        layers: those of the model that measure.
        by_batch: whether these normalize with the batch, as in training, or with the running statistics.
    """
    modes = [(module, vars(module).get("training", module.training)) for module in model.modules()]
    layers = list(layers)
    last = [(layer, vars(layer)["_batchnorm_measured"]) for layer in layers if "_batchnorm_measured" in vars(layer)]
    try:
        for module, _ in modes:
            module.training = False
        for layer in layers:
            assert layer.running_mean is not None
            device = layer.running_mean.device
            none = torch.zeros((), dtype=torch.int64, device=device)
            mix_in(layer, Measuring)
            vars(layer).update(_by_batch=by_batch, _calls=none, _items=none.clone())
            vars(layer).update(_pool=Moments.empty(layer.num_features, device))
        yield
    finally:
        for layer in layers:
            take_out(layer, Measuring)
            for name in ("_by_batch", "_pool", "_calls", "_items", "_batchnorm_measured"):
                vars(layer).pop(name, None)
        for layer, measured in last:
            vars(layer)["_batchnorm_measured"] = measured
        for module, mode in modes:
            module.training = mode


def population(
    model: nn.Module,
    layers: Mapping[str, BatchNorm],
    batches: Iterable[Any],
    call: Call,
    max_batches: int | None,
    by_batch: bool,
    ranks: Ranks,
) -> dict[str, Pooled]:
    """Pass once over the batches; return what each layer measured over all ranks, in float64 on the CPU.

    Raises:
        ValueError: there was no batch on any rank.
        RuntimeError: another rank raised. A rank that raised itself raises its own error.
    """
    pools: dict[str, Pooled] = {}
    seen, failure = 0, None
    try:
        with torch.no_grad(), measuring(model, layers.values(), by_batch):
            for batch in each_of(batches, max_batches):
                call(model, batch)
                seen += 1
            pools = {name: _pooled(layer) for name, layer in layers.items()}
    except Exception as error:
        if not ranks.several():
            raise
        failure = error  # the other ranks wait for this one: tell them before raising
    if ranks.several():
        gathered: list[Any] = [None] * dist.get_world_size(ranks.group)
        said = None if failure is None else f"{type(failure).__name__}: {failure}"
        dist.all_gather_object(gathered, (said, seen, pools), group=ranks.group)
        if failure is not None:
            raise failure
        for rank, (said, _, _) in enumerate(gathered):
            if said is not None:
                raise RuntimeError(f"rank {rank} could not measure its batches: {said}")
        seen = sum(of_rank for _, of_rank, _ in gathered)
        pools = {name: _merged([of_rank[name] for _, _, of_rank in gathered]) for name in layers}
    if not seen:
        raise ValueError("expected at least one batch, but there was none (has an iterator been used up before?)")
    return pools


def _pooled(layer: Any) -> Pooled:
    moments = Moments(layer._pool.count.cpu(), layer._pool.mean.cpu(), layer._pool.m2.cpu())
    return Pooled(moments, int(layer._calls), int(layer._items))


def _merged(pools: list[Pooled]) -> Pooled:
    """Merged over all ranks in their order, so that every rank has the same bits."""
    moments, calls, items = zip(*pools, strict=True)
    return Pooled(moments[0].merge(*moments[1:]), sum(calls), sum(items))


class Saved:
    """A copy of the running statistics of layers, and of their parameters if wanted, that can be restored.

    By layer and name, because moving or casting a model replaces its buffers.
    """

    def __init__(self, layers: Iterable[BatchNorm], parameters: bool) -> None:
        self._kept = [
            (layer, name, tensor.detach().clone())
            for layer in layers
            for name, tensor in (*layer.named_buffers(), *(layer.named_parameters() if parameters else ()))
        ]

    @torch.no_grad()
    def restore(self) -> None:
        """Restore everything, bit for bit."""
        for layer, name, kept in self._kept:
            getattr(layer, name).copy_(kept)
