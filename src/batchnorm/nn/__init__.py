"""Batch-normalization layers: drop-in subclasses of torch.nn's. How a model gets them is in `model` and `fuse`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._lazy import face
from .batchnorm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from .renorm import Renorm
from .sync import SyncBatchNorm

if TYPE_CHECKING:
    from ..fuse import FusedSequential as FusedSequential
    from ..fuse import Fusion as Fusion
    from ..fuse import explain_fusion as explain_fusion
    from ..model.convert import convert as convert
    from ..model.convert import revert as revert

# The rooms above know the layers; that these names are found here as well is all that the layers know of them.
_HOME = {
    "FusedSequential": "..fuse",
    "Fusion": "..fuse",
    "explain_fusion": "..fuse",
    "convert": "..model.convert",
    "revert": "..model.convert",
}

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "Renorm",
    "SyncBatchNorm",
    *face(__name__, _HOME),  # pyright: ignore[reportUnsupportedDunderAll]
]
