"""SyncBatchNorm, and how the batch-norm layers of a model are made to measure over all ranks of a process group."""

from __future__ import annotations

import copyreg
import inspect
import warnings
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from ..mixin import plain_class, set_class
from .layer import _BatchNorm
from .options import restore_options, set_options

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Model = TypeVar("Model", bound=nn.Module)


class SyncBatchNorm(_BatchNorm):
    """Batch normalization of (N, C, *) over the batches of all ranks: a drop-in for torch.nn.SyncBatchNorm.

    In training every rank normalises with the mean and variance of all ranks' samples, and gradients flow through them
    across ranks: together they compute what one process would on the joined batch. The counts are the true ones, so
    ranks may have batches of different sizes, masks, or empty batches. One collective in forward, one in backward, on
    any backend: on the CPU too. In eval, alone, or without a process group it is a plain layer.

    Every rank must run the same layers in the same order, and backward through each where the others do.

    It is no subclass of torch.nn.SyncBatchNorm, whose instances DistributedDataParallel refuses on the CPU.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype: as torch.nn's.
        process_group: whose ranks are measured together; None for all.
        options: those of `BatchNorm1d`.

    Raises:
        ValueError: fewer than 2 dimensions; one value per channel on all ranks together (told on the CPU alone, where
            looking costs nothing).
        RuntimeError: another number of channels than num_features; the other ranks did not answer within the process
            group's timeout.

    Source: torch.nn.SyncBatchNorm, whose parameters, buffers, state_dict and defaults it has.

    Example:
        >>> layer = SyncBatchNorm(3)
        >>> layer(torch.randn(8, 3, 5)).shape  # a single process: a plain layer
        torch.Size([8, 3, 5])
    """

    sync = True

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
            process_group: whose ranks are measured together; None for all.
        """
        from .._lazy import late

        return late("batchnorm.model.convert", "convert")(module, sync=True, process_group=process_group)


def synchronize(model: nn.Module, process_group: ProcessGroup | None) -> None:
    """Make every batch-norm layer of the model measure over all ranks: ours, and subclasses of torch.nn's."""
    left = []
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.modules.batchnorm._BatchNorm) or isinstance(layer, nn.SyncBatchNorm):
            continue
        cls = plain_class(layer)
        if not isinstance(layer, _BatchNorm):
            if isinstance(layer, LazyModuleMixin):
                left.append(f"{name or 'the model'} ({cls.__name__}): it has not seen an input yet")
                continue
            if not _calls_super(cls):
                left.append(f"{name or 'the model'} ({cls.__name__}): its forward does not call super().forward")
                continue
            set_class(layer, _derived(cls))
        # Attributes of the layer, not another class: what tells 1d, 2d and 3d apart stays.
        set_options(layer, {"sync": True, "process_group": process_group})
    if left:
        warnings.warn("not synchronized:\n" + "\n".join(left), stacklevel=3)


def unsynchronize(layer: nn.Module) -> None:
    """Undo `synchronize`, and all that `set_options` has done, for one layer."""
    restore_options(layer)
    torchs = plain_class(layer).__dict__.get("_derived_from")
    if torchs is not None:
        set_class(layer, torchs)
        for name in ("_measured", "_skipped"):
            layer.__dict__.pop(name, None)


def _calls_super(cls: type[nn.Module]) -> bool:
    """Whether forward of a subclass of torch.nn's layers reaches theirs, which ours can then stand in for."""
    own = cls.__mro__[: cls.__mro__.index(nn.modules.batchnorm._BatchNorm)]
    forwards = [inspect.unwrap(c.__dict__["forward"]) for c in own if "forward" in c.__dict__]
    return all("super" in forward.__code__.co_names for forward in forwards)


class _Derived(type):
    """The classes of `_derived`: made at run time, so pickled as what they are made of."""


def _reduce(cls: Any) -> tuple[Any, ...]:
    return _derived, (cls.__dict__["_derived_from"],)


copyreg.pickle(_Derived, _reduce)


@cache
def _derived(cls: type[nn.Module]) -> type[nn.Module]:
    """A subclass of the subclass, under its name, in which super().forward finds our layer before torch.nn's."""
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    bases: Any = (cls, _BatchNorm)
    made: Any = _Derived(cls.__name__, bases, {"_derived_from": cls, **names})
    return made
