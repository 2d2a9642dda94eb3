"""SyncBatchNorm: the layer that measures over all ranks of a process group."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from .._lazy import late
from .options import Options
from .public import OptionsByName

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Model = TypeVar("Model", bound=nn.Module)


class SyncBatchNorm(OptionsByName):
    """Batch normalization of (N, C, *) over the batches of all ranks: a drop-in for torch.nn.SyncBatchNorm.

    In training every rank normalizes with the mean and variance of all ranks' samples, and gradients flow through them
    across ranks: together they compute what one process would compute on the joined batch. Counts are exact, so ranks
    may have batches of different sizes, masks, or empty batches. It takes one collective in forward and one in
    backward, with any backend, also on the CPU. In eval, with one rank, or without a process group, it is a plain
    layer.

    Every rank must run the same layers in the same order, and run backward through each layer that the others do.

    It is not a subclass of torch.nn.SyncBatchNorm, because DistributedDataParallel refuses those on the CPU.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype: as torch.nn's.
        process_group: the ranks that measure together; None for all.
        options: those of `BatchNorm1d`.

    Raises:
        ValueError: fewer than 2 dimensions; one value per channel on all ranks together (checked on the CPU only, where
            reading it costs nothing).
        RuntimeError: the input does not have num_features channels; the other ranks did not answer within the process
            group's timeout.

    Source: torch.nn.SyncBatchNorm, whose parameters, buffers, state_dict and defaults it has.

    Example:
        >>> layer = SyncBatchNorm(3)
        >>> layer(torch.randn(8, 3, 5)).shape  # a single process: a plain layer
        torch.Size([8, 3, 5])
    """

    _batchnorm_options = Options(sync=True)

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: ProcessGroup | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        options = {"sync": True, "process_group": process_group, **options}
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, **options)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2D input, (N, C, *), but got {input.dim()}D input")

    @classmethod
    def convert_sync_batchnorm(cls, module: Model, process_group: ProcessGroup | None = None) -> Model:
        """torch.nn.SyncBatchNorm's method by that name, as `convert(module, sync=True, process_group=...)`.

        In place, unlike torch's: layers stay the same objects, with their hooks, shared places and subclasses.

        Args:
            module: any module, or a batch-norm layer itself.
            process_group: the ranks that measure together; None for all.
        """
        return late("batchnorm.model.convert", "convert")(module, sync=True, process_group=process_group)
