"""What a layer was given in a call, with its channels second and its mask beside it; and what it measured of that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..mixin import handed_over, option, plain_class
from ..moments import Moments, mask_of_lengths
from ..ops import choose
from ..pipeline import moments_of, under_transform

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


class HandedOver:
    """What a layer says itself of each call in train mode: ours do, and any that sets `measured` as ours do.

    It is what the call has normalized with: of all ranks where they are synchronized, nothing where a single value was
    normalized by the running statistics.

    Args:
        layer: the one whose calls are followed from now on.
    """

    def __init__(self, layer: nn.Module) -> None:
        self._last = _kept(layer)

    def is_fresh(self, layer: nn.Module) -> bool:
        """Whether the layer has handed anything over since this was last asked: ask after every call."""
        last, self._last = self._last, _kept(layer)
        return self._last is not None and self._last is not last

    def moments(self, layer: nn.Module) -> Any:
        """What was handed over last: an object with count, mean and m2."""
        moments = handed_over(layer) if _is_ours(layer) else self._last
        self._last = _kept(layer)  # once read, ours keep it in another form
        return moments

    def is_due(self, layer: nn.Module) -> bool:
        """Whether a layer hands over whatever it measures in an eager call, so that what is not there was not."""
        return _is_ours(layer) and not under_transform()


def moments_measured(
    layer: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], handed: HandedOver
) -> Moments | None:
    """Moments that a call in train mode has normalized with, in float64; None if it measured nothing."""
    if handed.is_fresh(layer):
        found = handed.moments(layer)
        count = found.count if isinstance(found.count, Tensor) else found.mean.new_full((), found.count).long()
        return Moments(count, found.mean.detach().double(), found.m2.detach().double())
    return None if handed.is_due(layer) else moments_given(layer, args, kwargs)


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


def _kept(layer: nn.Module) -> Any:
    return vars(layer).get("_batchnorm_measured" if _is_ours(layer) else "measured")


def _is_ours(layer: nn.Module) -> bool:
    return hasattr(type(layer), "_batchnorm_options")


def _takes_masks(layer: nn.Module) -> bool:
    """Whether it is a layer of ours; a converted subclass has the signature of its own class."""
    return _is_ours(layer) and "_derived_from" not in vars(plain_class(layer))
