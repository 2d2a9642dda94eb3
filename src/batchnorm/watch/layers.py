"""Which modules of a model are batch-norm layers, what they are called, and which of them are to be watched."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from ..model.adapters.adapter import is_lazy
from ..model.find import Found, classes_of, find
from ..runs.schema import LayerInfo


def choose(model: nn.Module, patterns: Sequence[str] | None) -> list[tuple[LayerInfo, nn.Module]]:
    """The batch-norm layers whose names match a pattern (None: all), in model order.

    Names are those in the bare model, so that they are the same however it is wrapped.

    Raises:
        ValueError: there is none, a pattern matches none, or one is lazy and has seen no batch.
    """
    batch_norms = find(model)
    found = {each.name or each.kind: each for each in batch_norms if each.adapter.learns}
    frozen = [each for each in batch_norms if not each.adapter.learns]
    if found and frozen and patterns is None:
        kinds = ", ".join(sorted({each.kind for each in frozen}))
        warnings.warn(
            f"{len(frozen)} of {len(batch_norms)} batch norms are not recorded, from {frozen[0].called} on: a {kinds} "
            "measures, tracks and learns nothing",
            stacklevel=3,
        )
    if patterns is None:
        if not found:
            if frozen:
                raise ValueError("model must have a batch norm to watch, but has only frozen ones")
            raise ValueError(
                f"model must have a batch norm to watch, but has only {classes_of(model)}; layers=[] records "
                "scalars only"
            )
        patterns = ["*"]
    names = [name for name in found if any(fnmatchcase(name, pattern) for pattern in patterns)]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"no batch-norm layer matches {pattern!r}; the model has {', '.join(found) or 'none'}")
    wrappers = [m for m in model.modules() if "_fsdp_wrapped_module" in m._modules]
    flat = {id(m) for wrapper in wrappers for m in wrapper.modules()}
    sharded = [name for name in names if id(found[name].layer) in flat or _is_distributed(found[name].layer)]
    if sharded:
        raise ValueError(
            f"{len(sharded)} of {len(names)} layers, the first {sharded[0]}, are sharded (FSDP, DTensor) and cannot be "
            "recorded, because no rank has their gamma, beta and gradients whole. Do not shard the batch norms, "
            "name other layers with layers=, or record only what you log, with layers=[]"
        )
    return [(_describe(name, found[name]), found[name].layer) for name in names]


def _is_distributed(layer: nn.Module) -> bool:
    """Whether any tensor of it is a DTensor, as fully_shard makes of parameters."""
    return any(hasattr(tensor, "full_tensor") for tensor in (*layer._parameters.values(), *layer._buffers.values()))


def _describe(name: str, found: Found) -> LayerInfo:
    layer, adapter = found.layer, found.adapter
    if is_lazy(layer):
        raise ValueError(f"layer {name!r} is lazy and has not seen a batch: run one forward before watching the model")
    return LayerInfo(
        name=name,
        kind=found.kind,
        channels=adapter.channels(layer),
        eps=adapter.eps(layer),
        momentum=adapter.momentum(layer),
        affine=layer.weight is not None or layer.bias is not None,
        tracks=adapter.learns and layer.track_running_stats,
    )
