"""Which samples make up each batch: reshuffled every epoch, or cut once and only the order reshuffled."""

from __future__ import annotations

import torch
from torch import Generator, Tensor


def cut(samples: int, batch_size: int, generator: Generator) -> list[Tensor]:
    """Numbers of all samples in random order, cut into batches; a last batch of one sample joins the one before.

    Batch normalization cannot train on one sample of one value a channel, and no sample should be lost for it.

    Example:
        >>> [len(batch) for batch in cut(9, 4, Generator().manual_seed(0))]
        [4, 5]
    """
    batches = list(torch.randperm(samples, generator=generator).split(batch_size))
    if len(batches) > 1 and len(batches[-1]) == 1:
        batches[-2:] = [torch.cat(batches[-2:])]
    return batches


class Batches:
    """The batches of each epoch, drawn from a seeded generator whose state a checkpoint keeps.

    Args:
        samples: how many samples there are.
        batch_size: samples a batch; the last one has what is left.
        seed: runs with the same seed see the same batches.
        fixed: keep the first epoch's batches for good and reshuffle their order alone. Else every epoch cuts anew.
    """

    def __init__(self, samples: int, batch_size: int, seed: int, fixed: bool) -> None:
        self.samples, self.batch_size, self.fixed = samples, batch_size, fixed
        self.generator = Generator().manual_seed(seed)
        # What the first epoch is cut into, in every arm: per-batch keeps it, and all arms are probed with it.
        self.first = cut(samples, batch_size, Generator().manual_seed(seed))

    def __len__(self) -> int:
        """Batches an epoch."""
        return len(self.first)

    def draw_epoch(self) -> list[tuple[int, Tensor]]:
        """Number and samples of each batch of the next epoch, in the order in which they are trained on."""
        if self.fixed:
            order = torch.randperm(len(self.first), generator=self.generator).tolist()
            return [(number, self.first[number]) for number in order]
        return list(enumerate(cut(self.samples, self.batch_size, self.generator)))
