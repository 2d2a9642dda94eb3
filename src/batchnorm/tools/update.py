"""no_update(): forwards that leave the running statistics alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

from torch import nn

from ..checks import check_model
from ..mixin import BatchNorm
from ..model.adapters.adapter import is_lazy
from ..model.find import find_or_warn


@contextmanager
def no_update(model: nn.Module) -> Iterator[None]:
    """Keep the running statistics, and their count, of every batch-norm layer as they are in the block.

    Everything else stays as it is: in training, layers normalize with the batch they measure, and gamma and beta get
    their gradients. Use it for a forward that is not a training step of the model: the second forward of
    sharpness-aware minimization, a teacher in train mode, a discriminator that only passes gradients to a generator.

    Blocks nest, and may overlap: a layer tracks again when the last block that has it ends. It works by the layers'
    attribute `track_running_stats`, so a copy of the model made inside the block does not track. Other models, and
    layers without running statistics, are left alone.

    With torch.nn's layers under activation checkpointing keep the backward inside the block: it runs their forward
    again, and tracks. Our layers recognize a recomputation and track nothing in it, wherever it runs.

    Args:
        model: any module, or a batch-norm layer itself; torch.nn's layers or ours.

    Raises:
        ValueError: a lazy layer has not seen an input yet.
        TypeError: not a module.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
        >>> with no_update(model):
        ...     y = model(torch.randn(8, 4))
        >>> model[1].num_batches_tracked, model[1].running_mean
        (tensor(0), tensor([0., 0., 0.]))
    """
    layers = tracking(model)
    _count_blocks(layers, 1)
    try:
        yield
    finally:
        _count_blocks(layers, -1)


_blocks: Counter[int] = Counter()  # how many no_update blocks have the layer of this id, which they keep alive
_counting = Lock()


def _count_blocks(layers: list[BatchNorm], more: int) -> None:
    with _counting:
        for layer in layers:
            _blocks[id(layer)] += more
            layer.track_running_stats = not _blocks[id(layer)]
            if layer.track_running_stats:
                del _blocks[id(layer)]


def tracking(model: nn.Module) -> list[BatchNorm]:
    """The layers that track, or would track without an open `no_update` block."""
    check_model(model)
    # Between here and the caller's line are the block's own frame and contextlib's.
    found = find_or_warn(model, "update", stacklevel=4)
    layers = [each.layer for each in found if each.adapter.learns]
    layers = [layer for layer in layers if layer.track_running_stats or id(layer) in _blocks]
    for layer in layers:
        if is_lazy(layer):
            raise ValueError(f"{type(layer).__name__} has not seen an input yet: run one batch through the model first")
    return [layer for layer in layers if layer.running_mean is not None]
