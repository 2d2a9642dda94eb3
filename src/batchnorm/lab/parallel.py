"""Training on several processes: who takes which samples, and what they tell each other."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..model.convert import convert
from .errors import LabError

Value = TypeVar("Value")
Model = TypeVar("Model", bound=nn.Module)
TIMEOUT_SECONDS = 60.0


@dataclass(frozen=True)
class Ranks:
    """The processes that train together, and which of them this is."""

    rank: int = 0
    world: int = 1

    def share(self, samples: Tensor) -> Tensor:
        """This rank's part of a batch: as many samples as the others', or one fewer, or none."""
        return samples.tensor_split(self.world)[self.rank]

    def folder(self, path: Path) -> Path:
        """Where this rank writes: the first into the run itself, the others beside it."""
        return path if self.rank == 0 else path / f"rank-{self.rank}"

    def synchronized(self, model: Model) -> Model:
        """The model, its batch norm over all ranks if there are several."""
        return model if self.world == 1 else convert(model, sync=True)

    def add_up(self, parameters: Iterable[nn.Parameter], *values: float) -> list[float]:
        """Give every rank the sum of all ranks' gradients, in one all-reduce; returns the sums of the values.

        DistributedDataParallel cuts gradients into other pieces at its first step than later, so that after a resume
        sums would be in another order, and end on other bits.
        """
        if self.world == 1:
            return list(values)
        gradients = [p.grad for p in parameters if p.grad is not None]
        parts = [*(g.flatten().double() for g in gradients), torch.tensor(values, dtype=torch.float64)]
        sums = torch.cat(parts)
        dist.all_reduce(sums)
        *totals, rest = sums.split([len(part) for part in parts])
        for gradient, total in zip(gradients, totals, strict=True):
            gradient.copy_(total.view_as(gradient))
        return rest.tolist()

    def wait(self) -> None:
        """Until every rank is here."""
        if self.world > 1:
            dist.barrier()

    def of_first(self, value: Value) -> Value:
        """What the first rank has."""
        values = [value]
        if self.world > 1:
            dist.broadcast_object_list(values)
        return values[0]


def ranks() -> Ranks:
    """This process's place in the process group, if there is one."""
    return Ranks(dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else Ranks()


@contextmanager
def joined(asked: bool) -> Iterator[Ranks]:
    """Inside the block this process is one of those that torchrun started.

    Args:
        asked: whether to train with the others.
    Raises:
        LabError: several processes, but not asked to train together; or asked, but alone and not started by torchrun;
            or, at the block's end, another rank ended or did not answer in time.
    """
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if several and not asked:
        raise LabError("torchrun started several processes: give --sync to train on all of them together")
    if asked and not dist.is_initialized() and "RANK" not in os.environ:
        raise LabError("--sync is for several processes: torchrun --nproc-per-node 2 -m batchnorm train --sync")
    if not asked:
        yield Ranks()
        return
    if not dist.is_initialized():
        dist.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT_SECONDS))
    try:
        yield ranks()
    except RuntimeError as error:
        if "gloo" not in f"{error}{error.__cause__}":
            raise
        raise LabError(
            f"another process ended, or did not answer within {TIMEOUT_SECONDS:.0f} seconds; look at what it printed, "
            "then continue with the same command and --resume RUN"
        ) from error
    finally:
        dist.destroy_process_group()
