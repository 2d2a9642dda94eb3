"""convert_to(): turn batch-norm layers into group, layer or instance normalization, or freeze them, in place."""

from __future__ import annotations

from typing import Literal, TypeVar

from torch import Tensor, nn

from ..mixin import option, plain_class
from ..model.adapters.adapter import is_lazy
from ..model.convert import become_torchs
from ..model.find import Found, require
from ..nn.frozen import Frozen
from ..nn.layer import BatchNormLayer as Ours
from .freeze import freeze

Model = TypeVar("Model", bound=nn.Module)

_MOST_GROUPS, _FEWEST_CHANNELS = 32, 8
# What a batch norm has and a group norm does not.
_OF_BATCH_NORM = vars(nn.SyncBatchNorm(1)).keys() - vars(nn.Module()).keys()


def convert_to(
    model: Model, to: Literal["group", "layer", "instance", "frozen"], *, num_groups: int | None = None
) -> Model:
    """Replace batch normalization by one that does not measure the batch, in every layer; returns the model.

        y = gamma * (x - mean) / sqrt(var + eps) + beta, where mean and var are those of one sample's group of channels

    Use it for small batches, ranks that disagree, or mixed data. The model then computes a different function, so its
    outputs change and it must be trained further. Gamma and beta stay the same parameters as a starting point, and an
    optimizer keeps moving them.

    - "group": groups of neighboring channels: the largest number that divides the channels, at most 32, with at least 8
      channels in each, because fewer cost accuracy; or `num_groups`.
    - "layer": all channels are one group.
    - "instance": each channel is one. An input (N, C) would become constant, so 1d layers are refused.
    - "frozen": not replaced; running statistics, gamma and beta stay as they are (`freeze`), as in the detectors that
      call it FrozenBatchNorm.

    The layers stay the same objects and become `torch.nn.GroupNorm`: names, hooks, modes, layers shared between places
    and what an optimizer holds stay. timm's BatchNormAct2d keeps running its activation. The running statistics are
    removed, so a state_dict has fewer entries than before.

    Args:
        model: any module, or a batch-norm layer itself; torch.nn's layers or ours. Convert part of a model by passing
            that part.
        to: see above.
        num_groups: for "group": the number of groups in every layer.

    Raises:
        ValueError: an unknown `to`; the model has no batch norm; num_groups does not divide a layer's channels; or a
            layer would lose something: a subclass, whose forward may do more, or a layer with a fused activation, with
            channels not in dimension 1, frozen, or lazy without an input yet. The model is then unchanged.

    Source: Wu & He 2018, "Group normalization": 32 groups; 8 channels in each cost nothing, 4 some (Table 3).

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU())
        >>> gamma = model[1].weight
        >>> bn.convert_to(model, "group")[1]
        GroupNorm(8, 64, eps=1e-05, affine=True, bias=True)
        >>> model[1].weight is gamma
        True
    """
    if to not in ("group", "layer", "instance", "frozen"):
        raise ValueError(f'expected "group", "layer", "instance" or "frozen", but got {to!r}')
    if num_groups is not None and to != "group":
        raise ValueError(f'num_groups is for "group", but got {to!r} with num_groups={num_groups}')
    if to == "frozen":
        return freeze(model, stats=True, affine=True)
    found = require(model, "convert")
    chosen: list[tuple[Found, int]] = []
    for each in found:
        name, layer = each.name, each.layer
        why = _lost(each)
        if why:
            raise ValueError(f"cannot convert {name or 'the layer'}: {why}")
        groups = {"layer": 1, "instance": layer.num_features}.get(to) or num_groups or _groups(layer.num_features)
        if groups < 1 or layer.num_features % groups:
            raise ValueError(f"num_groups={groups} does not divide the {layer.num_features} channels of {name}")
        if groups == layer.num_features and isinstance(layer, nn.BatchNorm1d):
            raise ValueError(
                f"cannot convert {name or 'the layer'}: for an input (N, C), a group of one channel gives nothing "
                'but beta; use "layer", or where the input is (N, C, L) put torch.nn.InstanceNorm1d there by hand'
            )
        chosen.append((each, groups))
    for each, groups in chosen:
        _become_group_norm(each, groups)
    return model


class GroupNormThen(nn.GroupNorm):
    """A group norm that runs children on its output, as the batch norm did that it replaces."""

    then: tuple[str, ...]

    def forward(self, input: Tensor) -> Tensor:
        """The children run in the order of `then`."""
        y = super().forward(input)
        for name in self.then:
            y = self._modules[name](y)  # pyright: ignore[reportOptionalCall]
        return y


def _lost(found: Found) -> str | None:
    """What the layer would lose as a group norm; None if nothing."""
    layer = found.layer
    if not found.adapter.learns:
        return f"{found.kind} is frozen; pass the other parts of the model"
    if is_lazy(layer):
        return "it has not seen an input yet; run one batch through the model first"
    if isinstance(layer, Frozen):
        return "it is frozen; unfreeze it, or pass the other parts of the model"
    if not isinstance(layer, Ours) and (why := found.adapter.kept(layer)) is not None:
        return f"it {why}"
    if not found.adapter.exact:
        return f"{found.kind} is a subclass, whose forward may do more; replace it by hand"
    if plain_class(layer) is not type(layer):
        return "it is inside an open block such as accumulate; end that block first"
    if len(found.adapter.after(layer)) != len(_children_after(found)):
        return "its fused activation would be lost; build it without one, and put the activation after it as a module"
    if option(layer, "channel_dim", 1) != 1:
        return f"its channels are in dimension {option(layer, 'channel_dim', 1)}, but a group norm's are in dimension 1"
    return None


def _children_after(found: Found) -> tuple[str, ...]:
    """Names of the layer's own children that run after the normalization; a fused activation is none."""
    names = {id(child): name for name, child in found.layer.named_children()}
    return tuple(names[id(module)] for module in found.adapter.after(found.layer) if id(module) in names)


def _groups(channels: int) -> int:
    """The largest divisor of `channels` that is at most 32 and leaves 8 channels per group; else 1."""
    most = min(_MOST_GROUPS, channels // _FEWEST_CHANNELS)
    return next((groups for groups in range(most, 0, -1) if channels % groups == 0), 1)


def _become_group_norm(found: Found, groups: int) -> None:
    layer, then = found.layer, _children_after(found)
    channels, eps = layer.num_features, layer.eps
    if isinstance(layer, Ours):
        become_torchs(layer)
    for name in _OF_BATCH_NORM & vars(layer).keys():
        del vars(layer)[name]
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        layer._buffers.pop(name, None)
    layer.__class__ = GroupNormThen if then else nn.GroupNorm  # pyright: ignore[reportAttributeAccessIssue]
    vars(layer).update({"then": then} if then else {})
    affine = layer.weight is not None or layer.bias is not None
    vars(layer).update(num_groups=groups, num_channels=channels, eps=eps, affine=affine)
