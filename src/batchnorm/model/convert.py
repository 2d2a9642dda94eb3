"""convert() and revert(): make the batch norms of a model ours, and back, in place."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from ..checks import check_model
from ..fuse import fuse as fuse_forwards
from ..fuse import left_over, unfuse
from ..mixin import plain_class, set_class
from ..nn.batchnorm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from ..nn.layer import BatchNormLayer as Ours
from ..nn.naming import lines_of
from ..nn.options import (
    Options,
    SharedOptions,
    beyond_torch,
    check_options,
    options_of,
    put_options,
    restore_options,
    set_options,
)
from ..nn.sync import SyncBatchNorm
from .adapters.adapter import class_of_torch
from .derive import derive, underived
from .find import Found, classes_of, find

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from typing_extensions import Unpack

Model = TypeVar("Model", bound=nn.Module)

_OURS: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.BatchNorm3d: BatchNorm3d,
    nn.SyncBatchNorm: SyncBatchNorm,
}
_TORCHS = {ours: torchs for torchs, ours in _OURS.items()}


def convert(
    model: Model,
    *,
    fuse: bool = False,
    sync: bool = False,
    process_group: ProcessGroup | None = None,
    **options: Unpack[SharedOptions],
) -> Model:
    """Make every batch norm of the model ours, in place, and return the model.

    The layers stay the same objects and only change class: parameters, buffers, hooks, the training flag, layers shared
    between places, names and the optimizer's references all stay as they are. torch.nn's layers become ours. A layer of
    a subclass gets a class derived from its own class and ours: all its own code stays, and `super().forward` calls
    ours. The same holds for timm's BatchNormAct2d, whose activation is fused where possible. A warning names the layers
    that cannot be converted and stay as they are: those with a forward that does not call `super().forward`, lazy,
    parametrized or sharded layers, and frozen look-alikes.

    Args:
        model: any module, or a batch-norm layer itself.
        fuse: also run each batch norm as one operation with the activation after it, or with the addition and the
            activation after it, wherever a forward calls them one after the other. The module gets a subclass of its
            class, with the forward rewritten from its source; only these calls change. Each rewritten call checks at
            run time that everything is as required (our layer, a plain tensor, an activation that fuses, no hook on
            either); otherwise it does what the source says. So later hooks, replacements and settings take effect.
        sync: also measure over all ranks, see `SyncBatchNorm`.
        process_group: the ranks that measure together; None for all.
        options: any of virtual_batch_size, renorm, nonfinite, singleton and unbiased, see `BatchNorm1d`: set on every
            layer of ours in the converted model. `revert` undoes it.

    Raises:
        ValueError: an option has an invalid value, or a layer cannot have it (virtual batches with sync or renorm,
            options that need running statistics, without them). The model is then unchanged.
        TypeError: not a module, or an option that can only be set on a single layer. The model is then unchanged.

    Warns:
        UserWarning: some batch norms stay as they are (it says how many, of which class, why, and without which
            options), or the model has none. With fuse: a module calls a batch norm and its activation in a way that
            cannot be fused (it says which module, which line, and why). `bn.nn.explain_fusion(model)` reports the same,
            and what is fused.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)  # before or after: it makes no difference
        >>> type(convert(model)[1]).__module__, type(revert(model)[1]).__module__
        ('batchnorm.nn.batchnorm', 'torch.nn.modules.batchnorm')
    """
    check_model(model)
    _check_names(options)
    found = find(model)
    kept = {each.name: why for each in found if (why := _kept_as(each)) is not None}
    chosen = [each for each in found if each.name not in kept]
    given = _given(options, sync, process_group)
    _check_options(chosen, given)
    for each in chosen:
        _become_ours(each)
        if given:
            set_options(each.layer, given)
    if not found:
        warnings.warn(f"nothing to convert: the model has no batch norm; it has {classes_of(model)}", stacklevel=2)
    if kept:
        warnings.warn(_left(found, kept, "converted", given), stacklevel=2)
    if fuse:
        fuse_forwards(model)
        left = left_over(model)
        if left:
            warnings.warn(f"converted, but not fused everywhere:\n{left}", stacklevel=2)
    return model


def revert(model: Model) -> Model:
    """Undo `convert`, whatever its options: every layer of ours becomes torch.nn's, in place; returns the model.

    Args:
        model: any module, or a batch-norm layer itself.

    Raises:
        ValueError: a layer was built with an option that torch.nn's layer does not have. The model is then unchanged.
        TypeError: not a module.

    Warns:
        UserWarning: layers whose class torch has changed since (parametrized, under fully_shard) stay ours.

    Example:
        >>> model = bn.convert(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)))
        >>> type(bn.revert(model)[1]).__module__
        'torch.nn.modules.batchnorm'
    """
    check_model(model)
    ours = [each for each in find(model) if isinstance(each.layer, Ours)]
    kept = {each.name: why for each in ours if (why := class_of_torch(each.layer)) is not None}
    chosen = [each for each in ours if each.name not in kept]
    for each in chosen:
        beyond = beyond_torch(each.layer, built=True)
        if beyond and plain_class(each.layer) in _TORCHS:
            said = ", ".join(f"{name}={value}" for name, value in beyond.items())
            raise ValueError(
                f"cannot revert {each.name or 'the layer'}: it was built with {said}, which torch.nn's layer does not "
                "have. Build it without (an activation can be a separate module after it)"
            )
    unfuse(model)
    for each in chosen:
        become_torchs(each.layer)
    if kept:
        warnings.warn(_left(ours, kept, "reverted", {}), stacklevel=2)
    return model


def _kept_as(found: Found) -> str | None:
    """Why a batch norm cannot be converted; None where it can be, or is ours already."""
    return None if isinstance(found.layer, Ours) else found.adapter.kept(found.layer)


def _become_ours(found: Found) -> None:
    layer = found.layer
    if isinstance(layer, Ours):
        return
    synchronizes, group = isinstance(layer, nn.SyncBatchNorm), vars(layer).pop("process_group", None)
    if plain_class(layer) in _OURS:
        set_class(layer, _OURS[plain_class(layer)])  # a frozen layer stays frozen
    else:
        derive(layer, found.adapter.forward(layer))
    if synchronizes:
        put_options(layer, sync=True, process_group=group)


def become_torchs(layer: Any) -> None:
    """Make a layer of ours what it was before, or torch.nn's of its kind."""
    restore_options(layer)
    group = options_of(layer).process_group
    if plain_class(layer) in _TORCHS:
        set_class(layer, _TORCHS[plain_class(layer)])
    elif not underived(layer):
        return  # a subclass of our layers was never converted
    for name in [name for name in vars(layer) if name.startswith("_batchnorm_")]:
        del vars(layer)[name]
    if isinstance(layer, nn.SyncBatchNorm):
        vars(layer)["process_group"] = group
    _match_statistics(layer)


def _given(options: Any, sync: bool, process_group: ProcessGroup | None) -> dict[str, Any]:
    return {**options, **({"sync": True, "process_group": process_group} if sync else {})}


def _check_names(options: Any) -> None:
    known = SharedOptions.__annotations__
    if options.keys() - known:
        raise TypeError(
            f"convert() sets {', '.join(known)} on all layers; got {', '.join(sorted(options.keys() - known))}: set "
            "such an option on one layer"
        )


def _check_options(chosen: Iterable[Found], given: dict[str, Any]) -> None:
    """Raise unless every layer that is to be ours can have the options."""
    check_options(Options(**given), tracks=True)
    for each in chosen:
        layer = each.layer
        becomes = layer if isinstance(layer, Ours) else _OURS.get(plain_class(layer), Ours)
        try:
            check_options(replace(options_of(becomes), **given), layer.running_mean is not None)
        except ValueError as error:
            raise ValueError(f"cannot convert {each.name or 'the layer'}: {error}") from None


def _left(found: list[Found], kept: dict[str, str], done: str, given: dict[str, Any]) -> str:
    """One sentence, and a line for each class and reason."""
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for each in found:
        if each.name in kept:
            groups[each.kind, kept[each.name]].append(each.called)
    without = ", ".join(f"{name}={value!r}" for name, value in given.items() if name != "process_group")
    lines = [f"{done} {len(found) - len(kept)} of {len(found)} batch norms; these stay as they are"]
    lines[0] += f", without {without}:" if without else ":"
    return "\n".join([*lines, *lines_of((kind, names, why) for (kind, why), names in groups.items())])


def _match_statistics(layer: nn.Module) -> None:
    """torch.nn's layers want running statistics of the parameters' dtype; ours keep them in float32 at least."""
    weight = layer._parameters["weight"]
    if weight is not None and weight.dtype in (torch.bfloat16, torch.float16):
        for name in ("running_mean", "running_var"):
            buffer = layer._buffers[name]
            layer._buffers[name] = None if buffer is None else buffer.to(weight.dtype)
