"""Channels in another dimension than 1: views that have them there, and back."""

from __future__ import annotations

import math

from torch import Tensor

from ..checks import check_residual, wrong_channels
from ..moments import broadcast_mask
from ..pipeline import Operands


def dimension_of_channels(input: Tensor, channel_dim: int, num_features: int) -> int:
    """channel_dim counted from the front; raises where the input has not num_features channels there."""
    dims = input.dim()
    dim = channel_dim if channel_dim > 0 else channel_dim + dims
    if not 1 <= dim < dims:
        raise IndexError(
            f"channel_dim={channel_dim} must be a dimension after the batch's, but the input has {dims} dimensions, "
            f"{tuple(input.shape)}"
        )
    if input.size(dim) != num_features:
        raise wrong_channels("each vector of the layer", (num_features,), input, dim)
    return dim


def channels_second(operands: Operands, dim: int, size: int) -> tuple[Operands, int]:
    """The operands, and the size of a virtual batch, with the channels moved from `dim` to dimension 1: views of x.

    What lies between batch and channels becomes part of the batch: (N, L, C) is seen as (N * L, C). Where x is the
    permuted view of a contiguous (N, C, *), it is seen as that instead, for the former would be a copy.
    """
    x, weight, bias, residual, mask = operands
    moved = x.movedim(dim, 1)
    mask = None if mask is None else broadcast_mask(mask, moved).squeeze(1)
    if residual is not None:
        check_residual(residual, x)
        residual = residual.expand_as(x)
    if moved.is_contiguous():
        return Operands(moved, weight, bias, None if residual is None else residual.movedim(dim, 1), mask), size
    x, residual, mask = (None if t is None else t.flatten(0, dim - 1) for t in (x, residual, mask))
    assert x is not None
    return Operands(x, weight, bias, residual, mask), size * math.prod(operands.x.shape[1:dim])


def channels_back(y: Tensor, input: Tensor, dim: int) -> Tensor:
    """Undo `channels_second`: y as the input was."""
    return y.movedim(1, dim) if y.dim() == input.dim() else y.unflatten(0, input.shape[:dim])
