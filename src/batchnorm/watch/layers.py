"""Which modules of a model are batch-norm layers, what they are called, and which of them are to be watched."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _LazyNormBase
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ..runs.schema import LayerInfo


def bare(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's and the data-parallel wrappers."""
    while True:
        inner = model.module if isinstance(model, (DataParallel, DistributedDataParallel)) else None
        inner = inner or model._modules.get("_orig_mod")
        if inner is None:
            return model
        model = inner


def choose(model: nn.Module, patterns: Sequence[str] | None) -> list[tuple[LayerInfo, _BatchNorm]]:
    """The batch-norm layers whose names match a pattern (None: all), in model order.

    Names are those in the bare model, so that they are the same however it is wrapped.

    Raises:
        ValueError: there is none, a pattern matches none, or one is lazy and has seen no batch.
    """
    found = {
        name.replace("_orig_mod.", "") or type(module).__name__: module
        for name, module in bare(model).named_modules()
        if isinstance(module, _BatchNorm)
    }
    if patterns is None:
        if not found:
            raise ValueError(
                "model must have a batch-norm layer to watch, and has none; layers=[] records scalars only"
            )
        patterns = ["*"]
    names = [name for name in found if any(fnmatchcase(name, pattern) for pattern in patterns)]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"no batch-norm layer matches {pattern!r}; the model has {', '.join(found) or 'none'}")
    return [(_describe(name, found[name]), found[name]) for name in names]


def _describe(name: str, layer: _BatchNorm) -> LayerInfo:
    if isinstance(layer, _LazyNormBase):
        raise ValueError(f"layer {name!r} is lazy and has not seen a batch: run one forward before watching the model")
    return LayerInfo(
        name=name,
        kind=type(layer).__name__,
        channels=layer.num_features,
        eps=layer.eps,
        momentum=layer.momentum,
        affine=layer.affine,
        tracks=layer.track_running_stats,
    )
