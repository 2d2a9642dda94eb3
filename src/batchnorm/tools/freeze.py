"""freeze() and unfreeze(): batch-norm layers that keep their running statistics, or gamma and beta, as they are."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from ..model.find import find_or_warn
from ..nn.frozen import Frozen, freeze_layer, unfreeze_layer

Model = TypeVar("Model", bound=nn.Module)


def freeze(model: Model, stats: bool = True, affine: bool = False) -> Model:
    """Freeze every batch-norm layer in the model, in place, until `unfreeze`; returns the model.

    "Freezing batch norm" can mean three different things; each is a separate choice here:

    - stats: normalize with the running statistics and keep them as they are, in training too. This survives
      `model.train()`, which would undo a plain `layer.eval()`, and `reset_running_stats()`, which
      torch.optim.swa_utils.update_bn calls on every layer. (`reset_parameters()` does reset them, as in a new layer.)
    - affine: gamma and beta get no gradient and keep their values.
    - Normalizing with each batch without tracking it is neither of these: see `no_update`.

    It works on torch.nn's layers (1d, 2d, 3d, sync, lazy), on ours, and on subclasses of either; other normalizations
    are left alone. A frozen layer is the same object, still an instance of its class, and says `frozen=` in its repr.
    Freezing again can freeze more, never less.

    The state_dict has the usual keys, and records what is frozen in its metadata, where torch keeps versions.
    torch.nn's layers load it like any other. A layer of ours, and any layer that is frozen already, is frozen as the
    saved one was, so a resumed training does not unfreeze it; loading never unfreezes. Formats without that metadata
    (safetensors, or a dict made from the state_dict) carry only the values.

    Args:
        model: any module, or a batch-norm layer itself. Freeze part of a model by passing that part.
        stats: keep the running statistics, and use them.
        affine: set `requires_grad` of gamma and beta to False, where it is True. Do this before wrapping the model in
            DistributedDataParallel, which looks at requires_grad when it is built.

    Raises:
        ValueError: neither is chosen, or a layer has no running statistics to keep. The model is then unchanged.

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

    Each layer gets back its class and the mode that the last train() or eval() set. Gamma and beta require a gradient
    again if they did before. Running statistics and their count have not changed while frozen.

    Args:
        model: any module, or a batch-norm layer itself; unfreeze part of a model by passing that part.

    Returns:
        The same model.

    Example:
        >>> layer = bn.freeze(bn.BatchNorm1d(3), affine=True)
        >>> layer.weight.requires_grad, bn.unfreeze(layer).weight.requires_grad
        (False, True)
    """
    for layer in model.modules():
        if isinstance(layer, Frozen):
            unfreeze_layer(layer)
    return model
