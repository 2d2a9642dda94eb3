"""freeze() and unfreeze(): batch-norm layers that keep their running statistics, or gamma and beta, as they are."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from ..model.find import find_or_warn
from ..nn.frozen import Frozen, freeze_layer, unfreeze_layer

Model = TypeVar("Model", bound=nn.Module)


def freeze(model: Model, stats: bool = True, affine: bool = False) -> Model:
    """Freeze every batch-norm layer in the model, in place, until `unfreeze`; returns the model.

    "Freezing batch norm" is said of three different things; here each is a choice of its own:

    - stats: normalize with the running statistics and leave them as they are, in training too, also after
      `model.train()`, which would end what a mere `layer.eval()` does, and through `reset_running_stats()`, which
      torch.optim.swa_utils.update_bn calls on every layer. (`reset_parameters()` does set them as in a new layer.)
    - affine: gamma and beta get no gradient and stay as they are.
    - Normalizing with each batch but not tracking it is neither: see `no_update`.

    It works on torch.nn's layers (1d, 2d, 3d, sync, lazy), on ours, and on subclasses of either; other normalizations
    are left alone. A frozen layer is the same object, still an instance of its class, and says `frozen=` in its repr.
    Freezing again adds to what is frozen, and never takes away.

    The state_dict has the usual keys, and beside them (where torch keeps versions) what is frozen. torch.nn's layers
    load it as any other. A layer of ours, and any layer that is frozen already, becomes frozen as the loaded one was,
    so that a resumed training does not thaw; loading never unfreezes. Formats without that metadata (safetensors, or a
    dict made from the state_dict) carry the values alone.

    Args:
        model: any module, or a batch-norm layer itself. Freeze part of a model by passing that part.
        stats: keep the running statistics, and use them.
        affine: set `requires_grad` of gamma and beta to False, where it is True. Do it before wrapping the model in
            DistributedDataParallel, which takes note of what requires a gradient.

    Raises:
        ValueError: neither is chosen; or a layer has no running statistics to keep. Nothing has been changed then.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
        >>> freeze(model).train()[1].training
        False
        >>> model[1]
        BatchNorm1d(3, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True, frozen=stats)
        >>> unfreeze(model)[1].training
        True
    """
    if not (stats or affine):
        raise ValueError("expected stats=True or affine=True, but got neither: there is nothing to freeze")
    layers = {found.name: found.layer for found in find_or_warn(model, "freeze") if found.adapter.learns}
    if stats:
        without = [name or "the layer" for name, layer in layers.items() if layer.running_mean is None]
        if without:
            raise ValueError(
                f"cannot freeze the statistics of {', '.join(without)}: built with track_running_stats=False, a layer "
                "has no running statistics to keep. Freeze the other parts of the model one by one, or pass stats=False"
            )
    for layer in layers.values():
        freeze_layer(layer, stats, affine)
    return model


def unfreeze(model: Model) -> Model:
    """Undo every `freeze` in the model, in place; returns the model.

    Each layer is again in the mode that the last train() or eval() set, gamma and beta require a gradient again if they
    did, and the class is the one it was. Running statistics and their count have not changed meanwhile.

    Args:
        model: any module, or a batch-norm layer itself; unfreeze part of a model by passing that part.
    """
    for layer in model.modules():
        if isinstance(layer, Frozen):
            unfreeze_layer(layer)
    return model
