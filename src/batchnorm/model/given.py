"""What a layer was given in a call, with its channels second and its mask beside it; and the Moments of that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..mixin import option, plain_class
from ..moments import Moments, mask_of_lengths
from ..ops import choose
from ..pipeline import moments_of

UNKNOWN = -1  # a count that only the device could tell


class Given(NamedTuple):
    """The samples of one call.

    Attributes:
        x: (N, C, *), a view of the input, detached.
        mask: bool, broadcastable to x without its channels: True counts; None for all.
    """

    x: Tensor
    mask: Tensor | None


def given(layer: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Given:
    """The samples of a call of the layer, as a forward hook sees its arguments.

    Our layers say themselves where their channels are, and take a mask or lengths; all others have their channels in
    dimension 1, and whatever else they are given is theirs.
    """
    x = _input(args, kwargs).detach()
    dim = option(layer, "channel_dim", 1)
    mask = None
    if _takes_masks(layer):
        mask = args[2] if len(args) > 2 else kwargs.get("mask")
        if kwargs.get("lengths") is not None:
            mask = mask_of_lengths(kwargs["lengths"], x, dim, mask)
    return Given(x.movedim(dim, 1), mask)


def moments_given(layer: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Moments:
    """Moments of the samples, in float64: this rank's alone, of all virtual batches together."""
    x, mask = given(layer, args, kwargs)
    return moments_of(choose.steps(x).measure(x, mask))


def count_given(layer: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """How many values a channel has, N * S; `UNKNOWN` where a mask decides. Works in a traced call."""
    x = _input(args, kwargs)
    if _takes_masks(layer) and (len(args) > 2 or kwargs.get("mask") is not None or kwargs.get("lengths") is not None):
        return UNKNOWN
    return x.numel() // x.shape[option(layer, "channel_dim", 1)]


def _input(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    if args:
        return args[0]
    return kwargs["input"] if "input" in kwargs else next(iter(kwargs.values()))  # a subclass may call it anything


def _takes_masks(layer: nn.Module) -> bool:
    """Whether it is a layer of ours; a converted subclass has the signature of its own class."""
    return hasattr(type(layer), "_batchnorm_options") and "_derived_from" not in vars(plain_class(layer))
