"""Statistics across the ranks of a process group: one collective forward, one backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..moments import Moments
from .plain import statistics_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


_HELD = 2048  # channels per message: few layers have more


class RanksDiffer(RuntimeError):
    """The ranks of a process group have different numbers of channels."""


def several(ranks: ProcessGroup | None) -> ProcessGroup | None:
    """The process group (None: of all processes) if there is one and it has another rank, else None."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    ranks = ranks or dist.group.WORLD
    return ranks if dist.get_world_size(ranks) > 1 else None


def merge_over(statistics: Tensor, ranks: ProcessGroup) -> Tensor:
    """Statistics of the union of all ranks' samples, (3, C), the same bits on every rank.

    One all-gather of (count, mean, m2) for every channel; a rank without samples takes part with counts of 0.

    Raises:
        RanksDiffer: on every rank, if their numbers of channels differ. Checked on the CPU only, because elsewhere
            reading them would wait for the device.
    """
    if statistics.is_cpu and not torch.compiler.is_compiling():
        merged = _exchanged(statistics, ranks).merged()
    else:
        merged = Moments(*gather(statistics, ranks).unbind(1)).merged()
    return statistics_of(merged.count, merged.mean, merged.m2)


def _exchanged(statistics: Tensor, ranks: ProcessGroup) -> Moments:
    """The Moments of all ranks, stacked, by messages of one length, independent of a rank's number of channels.

    gloo aborts, or mixes up values, if ranks send messages of different lengths. Only more channels than fit one
    message take a second message.
    """
    channels = statistics.size(1)
    held = statistics[1:, :_HELD]
    message = statistics.new_zeros(2 + 2 * _HELD)
    message[0], message[1] = channels, statistics[0, 0] if channels else 0
    message[2 : 2 + held.numel()] = held.flatten()
    everyones = gather(message, ranks)
    found = [int(each) for each in everyones[:, 0].tolist()]
    if len(set(found)) > 1:
        raise RanksDiffer(
            f"expected the same number of channels on every rank, but the ranks have {found}, in their order; the "
            "running statistics are as they were. Build the same model on every rank, and run its layers in the same "
            "order"
        )
    means_and_m2s = everyones[:, 2 : 2 + held.numel()].unflatten(1, held.shape)
    if channels > _HELD:
        means_and_m2s = torch.cat((means_and_m2s, gather(statistics[1:, _HELD:], ranks)), 2)
    return Moments(everyones[:, 1:2], *means_and_m2s.unbind(1))


def is_lonely(statistics: Tensor) -> bool:
    """Whether ranks together have one value per channel. On the CPU only: elsewhere it would wait for the device."""
    count = statistics[0]
    return count.is_cpu and not torch.compiler.is_compiling() and count.numel() > 0 and count[0].item() == 1


def gather(mine: Tensor, ranks: ProcessGroup) -> Tensor:
    """The tensors of all ranks, of one shape, stacked in the order of the ranks: one all-gather."""
    mine = mine.unsqueeze(0).contiguous()  # gloo wants the ranks' dimension in both
    everyones = mine.new_empty((dist.get_world_size(ranks), *mine.shape[1:]))
    # torch 2.13 renames it, and warns about the old name.
    all_gather = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor
    _together(all_gather, everyones, mine, ranks)
    return everyones


def sum_over(sums: Tensor, ranks: ProcessGroup) -> Tensor:
    """The sum of all ranks' sums: one all-reduce."""
    total = sums.clone()
    _together(dist.all_reduce, total, group=ranks)
    return total


def refuse_more_derivatives(ranks: ProcessGroup | None) -> None:
    """Raise if there are several ranks: nothing computes their part in a second derivative."""
    if ranks is not None:
        raise RuntimeError(
            "synchronized batch normalization supports only first derivatives, by backward(): others would need other "
            "ranks' part. Take higher derivatives on one rank (without a process group) or in eval mode"
        )


def _together(collective: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    if torch.compiler.is_compiling():
        collective(*args, **kwargs)
        return
    try:
        collective(*args, **kwargs)
    except RuntimeError as error:
        raise RuntimeError(
            "synchronized batch normalization got no answer from another rank: every rank of the process group must "
            "run the same layers in the same order, with an empty batch where it has no samples, and run backward "
            "where the others do. Look for the rank that raised or died first"
        ) from error
