"""The samples of one call of a layer, channels second, with their mask; and the moments that the layer measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..mixin import handed_over, option, plain_class
from ..moments import Moments, mask_of_lengths
from ..ops import choose
from ..pipeline import moments_of, under_transform

UNKNOWN = -1  # a count that would have to be read from the device


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

    Our layers know where their channels are, and take a mask or lengths. All others have their channels in dimension 1;
    their other arguments are ignored here.
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
    """Moments of the samples in float64: of this rank only, over all virtual batches together."""
    x, mask = given(layer, args, kwargs)
    return moments_of(choose.steps(x).measure(x, mask))


class HandedOver:
    """What a layer itself reports of each call in train mode: ours do, and any that sets `measured` likewise.

    It is what the call has normalized with: over all ranks for synchronized layers, and nothing if a single value was
    normalized by the running statistics.

    Args:
        layer: the one whose calls are followed from now on.
    """

    def __init__(self, layer: nn.Module) -> None:
        self._last = _kept(layer)

    def is_fresh(self, layer: nn.Module) -> bool:
        """Whether the layer has handed anything over since the last time this was asked. Ask after every call."""
        last, self._last = self._last, _kept(layer)
        return self._last is not None and self._last is not last

    def moments(self, layer: nn.Module) -> Any:
        """What was handed over last: an object with count, mean and m2."""
        moments = handed_over(layer) if _is_ours(layer) else self._last
        self._last = _kept(layer)  # once it has been read, our layers keep it in another form
        return moments

    def is_due(self, layer: nn.Module) -> bool:
        """Whether a layer reports all it measures in an eager call, so that no report means nothing was measured."""
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
    """Values per channel, N * S; `UNKNOWN` if a mask decides. Works in a traced call."""
    x = _input(args, kwargs)
    if _takes_masks(layer) and (len(args) > 2 or kwargs.get("mask") is not None or kwargs.get("lengths") is not None):
        return UNKNOWN
    return x.numel() // x.shape[option(layer, "channel_dim", 1)]


def _input(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    if args:
        return args[0]
    return kwargs["input"] if "input" in kwargs else next(iter(kwargs.values()))  # a subclass may give it any name


def _kept(layer: nn.Module) -> Any:
    return vars(layer).get("_batchnorm_measured" if _is_ours(layer) else "measured")


def _is_ours(layer: nn.Module) -> bool:
    return hasattr(type(layer), "_batchnorm_options")


def _takes_masks(layer: nn.Module) -> bool:
    """Whether it is a layer of ours; a converted subclass has the signature of its own class."""
    return _is_ours(layer) and "_derived_from" not in vars(plain_class(layer))
