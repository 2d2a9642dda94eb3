"""pool_buffers() and in_step(): the same running statistics, and the same number of steps, on every rank."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from .moments import Moments
from .ops.collective import gather, several

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Batch = TypeVar("Batch")


@torch.no_grad()
def pool_buffers(model: nn.Module, process_group: ProcessGroup | None = None) -> None:
    """Pool the running statistics of all ranks, so that every rank has those of all the data.

        n = sum n_r;  mean = sum n_r mean_r / n;  var = sum n_r (var_r + (mean_r - mean)^2) / n

    Use it before evaluating or saving, if each layer measured only the batches of its own rank. Rank 0's buffers, which
    DistributedDataParallel broadcasts, describe one rank's data. The average of the variances lacks the spread between
    the ranks' means; the law of total variance includes it.

    n_r is the rank's num_batches_tracked: every batch counts the same, so a rank with more batches weighs more, and one
    that has not trained weighs nothing. (With a constant momentum a rank's statistics describe its last batches, which
    stand for the earlier ones.) In a layer that does not count batches, all ranks weigh the same. The counts stay as
    they are, and so does a layer that no rank has trained. Each rank's own statistics lack the spread between the means
    of its batches; pooling cannot restore that, `recalibrate` can.

    One collective serves all layers, torch.nn's or ours; every rank has to call it. Synchronized layers agree already.
    With DistributedDataParallel set broadcast_buffers=False, or rank 0's statistics replace the others' at every step.

    Args:
        model: any module; of the same architecture on every rank.
        process_group: the ranks; None for all. Nothing is done without torch.distributed, or with one rank.

    Raises:
        RuntimeError: the other ranks did not take part within the process group's timeout.

    Source: law of total variance, by `Moments`.

    Example:
        >>> bn.pool_buffers(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)))  # a single process: nothing to pool
    """
    layers = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
    layers = [layer for layer in layers if layer.running_mean is not None and layer.running_var is not None]
    ranks = several(process_group)
    if ranks is None or not layers:
        return
    everyones = gather(torch.cat([_packed(layer) for layer in layers], 1), ranks)
    count, mean, var = everyones.unbind(1)
    pooled = Moments(count, mean, var * count).merged()
    sizes = [layer.num_features for layer in layers]
    for layer, *values in zip(
        layers, *(t.split(sizes) for t in (pooled.count, pooled.mean, pooled.m2 / pooled.count)), strict=True
    ):
        seen, *statistics = values
        for running, value in zip((layer.running_mean, layer.running_var), statistics, strict=True):
            assert running is not None
            value, trained = value.to(running.device), (seen > 0).to(running.device)
            running.copy_(torch.where(trained, value, running.double()))


def _packed(layer: nn.modules.batchnorm._NormBase) -> Tensor:
    """Count, mean and variance, (3, C) float64."""
    mean, var, count = layer.running_mean, layer.running_var, layer.num_batches_tracked
    assert mean is not None
    assert var is not None
    counts = torch.ones_like(mean, dtype=torch.float64) if count is None else count.double().expand_as(mean)
    return torch.stack((counts, mean.double(), var.double()))


def in_step(batches: Iterable[Batch], process_group: ProcessGroup | None = None) -> Iterator[Batch]:
    """Yield this rank's batches, and then empty batches until no rank has a batch left.

    All ranks then take the same number of steps, and meet in every collective: those of synchronized layers, and those
    of DistributedDataParallel's gradients. (DistributedDataParallel's own `join` does not know collectives in a
    forward: if the model has synchronized layers, it can only raise, throw_on_early_termination=True.) The loss of an
    empty batch may be NaN, the mean over nothing. The gradient of such a batch is empty, and the parameters' gradients
    are 0.

    Each step waits for one collective of one number.

    Args:
        batches: tensors, or tuples, lists and dicts of them, with the samples in dimension 0.
        process_group: the ranks; None for all.

    Raises:
        ValueError: this rank has no batches at all, so the shape of an empty one is unknown.

    Example:
        >>> [len(batch) for batch in in_step(torch.ones(5, 2).split(2))]  # a single process: its own batches
        [2, 2, 1]
    """
    ranks, batch, remaining = several(process_group), None, iter(batches)
    while True:
        following = next(remaining, None)
        if ranks is None:
            if following is None:
                return
        else:
            left = torch.tensor([following is not None, batch is None and following is None], dtype=torch.float64)
            left = gather(left.to(_device(ranks)), ranks).amax(0).tolist()
            if left[1]:
                raise ValueError(
                    "every rank needs at least one batch, but this one has none: give it one, empty if necessary"
                )
            if not left[0]:
                return
        if following is None:
            following = tree_map_only(Tensor, lambda tensor: tensor[:0], batch)
        batch = following
        yield following  # pyright: ignore[reportReturnType]


def _device(ranks: ProcessGroup) -> torch.device:
    return torch.device("cuda" if dist.get_backend(ranks) == "nccl" else "cpu")
