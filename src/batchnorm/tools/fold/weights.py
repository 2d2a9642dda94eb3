"""The arithmetic of folding: a layer's weight and bias with a batch norm in them, for every kind of layer alike."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...model.find import Found

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
TAKES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)


def folded_into(found: Found, other: Any, before: bool) -> tuple[nn.Parameter, nn.Parameter]:
    """Weight and bias of the other layer with this batch norm folded in; `before`: the other layer comes before it."""
    scale, shift = scale_and_shift(found)
    old, groups, transposed = other.weight, getattr(other, "groups", 1), isinstance(other, TRANSPOSED)
    w = _exact(old).view(groups, old.size(0) // groups, old.size(1), -1)
    b = scale.new_zeros(1) if other.bias is None else _exact(other.bias)
    # A group's output channels are in dimension 1 and its input channels in 2; transposed, the other way round.
    channels = (groups, -1, 1, 1) if before != transposed else (groups, 1, -1, 1)
    if before:
        b = b * scale + shift
    elif transposed:  # the position of an output decides which weights reach it, so the shift has to be 0
        b = b.expand(other.out_channels)
    else:
        b = b + (w * shift.view(channels)).sum((2, 3)).flatten()
    w = (w * scale.view(channels)).view(old.shape)
    weight, bias = (nn.Parameter(t.to(old.device, old.dtype), requires_grad=old.requires_grad) for t in (w, b))
    return weight, bias


def scale_and_shift(found: Found) -> tuple[Tensor, Tensor]:
    """The layer in eval mode as y = scale * x + shift, in float64."""
    layer = found.layer
    scale = torch.rsqrt(_exact(layer.running_var) + found.adapter.eps(layer))
    if layer.weight is not None:
        scale = scale * _exact(layer.weight)
    shift = -scale * _exact(layer.running_mean)
    return scale, shift if layer.bias is None else shift + _exact(layer.bias)


def computes_as_torchs(other: nn.Module) -> bool:
    """Whether the layer is of a class of torch's, or of a subclass that computes what that does."""
    base = next((base for base in TAKES if isinstance(other, base)), None)
    methods = ("forward", "_conv_forward", "_output_padding", "__call__")
    return base is not None and all(getattr(type(other), m, None) is getattr(base, m, None) for m in methods)


def _exact(tensor: Tensor) -> Tensor:
    # On the CPU, because not every device has float64.
    return tensor.detach().to("cpu", torch.float64)


def pads_with_zeros(layer: Any) -> bool:
    """Whether some outputs see zeros in place of the layer's input."""
    return isinstance(layer, TRANSPOSED) or (
        getattr(layer, "padding_mode", "") == "zeros" and any(layer._reversed_padding_repeated_twice)
    )
