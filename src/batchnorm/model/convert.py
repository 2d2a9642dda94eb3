"""convert() and revert(): torch.nn's batch-norm layers made ours and back, in place."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import nn

from ..checks import check_model
from ..fuse import explain_fusion, unfuse
from ..fuse import fuse as fuse_forwards
from ..mixin import BatchNorm, plain_class, set_class
from ..nn.batchnorm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from ..nn.layer import _BatchNorm
from ..nn.options import SharedOptions, beyond_torch, check_options, options_of, set_options
from ..nn.sync import SyncBatchNorm, synchronize, unsynchronize

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
    """Make every torch.nn.BatchNorm1d/2d/3d and SyncBatchNorm in the model ours, in place, and return the model.

    The layers stay the same objects and only change class: parameters, buffers, hooks, the training flag, layers shared
    between places, names and the optimizer's references all stay as they are. Subclasses of torch.nn's layers are left
    alone, for they may compute something else; so are lazy layers that have not seen an input yet.

    Args:
        model: any module, or a batch-norm layer itself.
        fuse: also run each batch norm together with the activation after it, or the addition and the activation, as one
            operation, wherever a forward calls them one after the other. The module gets a subclass of its class with
            the forward rewritten from its source, in which only these calls are others; each decides when it runs
            whether everything is as it has to be (our layer, a plain tensor, an activation that fuses, no hook on
            either), and else does what the source says. So what is hooked, replaced or set later is obeyed.
        sync: also measure over all ranks, see `SyncBatchNorm`. Subclasses of torch.nn's layers too: they get a subclass
            of their own class in which `super().forward` is ours.
        process_group: whose ranks are measured together; None for all.
        options: any of virtual_batch_size, renorm, nonfinite, singleton and unbiased, see `BatchNorm1d`: set on every
            layer of ours that is in the model then. `revert` undoes it.

    Raises:
        ValueError: an option is none, or not for one of the layers (virtual batches with sync or renorm, options that
            need running statistics without them); nothing has been changed then.
        TypeError: not a module, or another option, which is to be set on a layer; nothing has been changed then.

    Warns:
        UserWarning: with fuse, some module calls a batch norm and its activation in a way that could not be fused:
            which, in which line, and why. `bn.nn.explain_fusion(model)` says so too, and what is fused. With sync, a
            subclass of torch.nn's whose forward does not call `super().forward`, or a lazy layer, was left alone.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)  # before or after: it makes no difference
        >>> type(convert(model)[1]).__module__, type(revert(model)[1]).__module__
        ('batchnorm.nn.batchnorm', 'torch.nn.modules.batchnorm')
    """
    check_model(model)
    _check_options(model, options, sync)
    _swap(model, _OURS)
    if sync:
        synchronize(model, process_group)
    for layer in model.modules():
        if isinstance(layer, _BatchNorm) and options:
            set_options(layer, options)
    if fuse:
        fuse_forwards(model)
        explained = explain_fusion(model).items()
        left = [f"{name or 'the model'}: {reason}" for name, fusion in explained for reason in fusion.left]
        if left:
            warnings.warn("converted, but not fused everywhere:\n" + "\n".join(left), stacklevel=2)
    return model


def revert(model: Model) -> Model:
    """Undo `convert`, whatever its options: every layer of ours becomes torch.nn's, in place; returns the model.

    Args:
        model: any module, or a batch-norm layer itself.

    Raises:
        ValueError: a layer is built with an option that torch.nn's would drop; nothing has been changed then.
        TypeError: not a module.
    """
    check_model(model)
    for name, layer in model.named_modules():
        if not (isinstance(layer, _BatchNorm) and plain_class(layer) in _TORCHS):
            continue
        beyond = beyond_torch(layer, built=True)
        if beyond:
            options = ", ".join(f"{name}={value}" for name, value in beyond.items())
            raise ValueError(
                f"cannot revert {name or 'the layer'}: it is built with {options}, which torch.nn's layer does not "
                "have. Build it without (an activation can be a module after it)"
            )
    unfuse(model)
    for layer in model.modules():
        if isinstance(layer, _BatchNorm):
            unsynchronize(layer)
    _swap(model, _TORCHS)
    for layer in model.modules():
        if plain_class(layer) in _OURS:
            for name in ("_measured", "_skipped", "initializers"):
                layer.__dict__.pop(name, None)
            if isinstance(layer, nn.SyncBatchNorm):
                layer.__dict__.setdefault("process_group", None)
            _match_statistics(layer)
    return model


def _check_options(model: nn.Module, options: SharedOptions, sync: bool) -> None:
    """Raise unless every layer that is to be ours can have the options."""
    known = SharedOptions.__annotations__
    if options.keys() - known:
        raise TypeError(
            f"convert() sets {', '.join(known)} on all layers; got {', '.join(sorted(options.keys() - known))}: set it "
            "on the layer that shall have it"
        )
    check_options({**options_of(_BatchNorm), **options}, tracks=True)
    for name, layer in model.named_modules():
        becomes = layer if isinstance(layer, _BatchNorm) else _OURS.get(plain_class(layer))
        if isinstance(layer, BatchNorm) and (becomes or sync):
            has = options_of(becomes or _BatchNorm)
            has |= {**options, "sync": sync or has["sync"]}
            try:
                check_options(has, layer.running_mean is not None)
            except ValueError as error:
                raise ValueError(f"cannot convert {name or 'the layer'}: {error}") from None


def _match_statistics(layer: nn.Module) -> None:
    """torch.nn's layers want running statistics of the parameters' dtype; ours keep them in float32 at least."""
    weight = layer._parameters["weight"]
    if weight is not None and weight.dtype in (torch.bfloat16, torch.float16):
        for name in ("running_mean", "running_var"):
            buffer = layer._buffers[name]
            layer._buffers[name] = None if buffer is None else buffer.to(weight.dtype)


def _swap(model: nn.Module, to: dict[type[nn.Module], type[nn.Module]]) -> None:
    for layer in model.modules():
        if plain_class(layer) in to:
            set_class(layer, to[plain_class(layer)])  # a frozen layer stays frozen
