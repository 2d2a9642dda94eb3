"""Which layer a batch norm can be folded into, and why it cannot."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from ...mixin import observed, option
from ...model.adapters.adapter import is_lazy
from ...model.find import Found
from .calls import Calls
from .weights import TAKES, computes_as_torchs, pads_with_zeros, scale_and_shift


class Stays(Exception):
    """Why a layer cannot be folded."""


def neighbor(found: Found, calls: Calls, before: bool) -> nn.Module:
    """The previous layer, if it feeds only this one; or the next layer, if only this one feeds it.

    Raises:
        Stays: there is no such layer, or this one is not in a state to be folded.
    """
    layer = found.layer
    if not found.adapter.exact:
        raise Stays(f"{found.kind} is an unknown class, which may compute something else")
    if is_lazy(layer):
        raise Stays("it is lazy and has not seen an input yet")
    if layer.training and found.adapter.learns:
        raise Stays("it is in train mode, so it normalizes with each batch: call eval(), or freeze it")
    if not found.adapter.tracks(layer):
        raise Stays("it has no running statistics, so it normalizes with each batch in eval mode too")
    if layer in calls.unknown:
        raise Stays(f"its calls cannot be known: {calls.unknown[layer]}")
    if not calls.of[layer]:
        raise Stays("the model does not call it")
    if any(len(node.args) != 1 or node.kwargs for node in calls.of[layer]):
        raise Stays("it is called with other arguments than its input, or with its input by name")
    beside = [n for node in calls.of[layer] for n in ([calls.source(node.args[0])] if before else node.users)]
    others = {calls.layer(n): calls.name(n) for n in beside}
    other = next(iter(others)) if len(others) == 1 else None
    if not isinstance(other, TAKES):
        said = " and ".join(sorted(others.values())) or "nothing"
        raise Stays(f"its input comes from {said}" if before else f"its output goes to {said}")
    fed = [n for node in calls.of[other] for n in (calls.readers(node) if before else node.args)]
    elsewhere = sorted({calls.name(n) for n in fed if calls.layer(n) is not layer})
    if elsewhere:
        said = " and ".join(elsewhere)
        raise Stays(f"{others[other]} feeds {said} too" if before else f"{others[other]} is fed by {said} too")
    return other


def check(
    found: Found, other: Any, calls: Calls, owners: Mapping[int, int], before: bool, ranks: Iterable[int]
) -> None:
    """Raise `Stays` if the two are neighbors, but folding would not be exact, or would change something else.

    Args:
        owners: how many modules have a parameter, by its id.
        ranks: the numbers of dimensions of what the batch norm is given.
    """
    layer = found.layer
    if parametrize.is_parametrized(other):
        raise Stays("the layer beside it has a parametrized weight: remove the parametrization first")
    if not computes_as_torchs(other):
        raise Stays(f"the layer beside it, {type(other).__name__}, is an unknown class, which may do something else")
    if other in calls.unknown:
        raise Stays(f"the calls of the layer beside it cannot be known: {calls.unknown[other]}")
    for module in (layer, other):
        if observed(module):
            raise Stays(f"there is a hook on {type(module).__name__}, as of weight_norm or pruning: remove it first")
        if any(tensor in calls.read for tensor in (*module.parameters(), *module.buffers())):
            raise Stays(f"a forward uses the tensors of {type(module).__name__} without calling it")
    if any(owners[id(p)] > 1 for p in other.parameters()):
        raise Stays("the layer beside it shares its weight or bias with another")
    if not before and found.adapter.after(layer):
        raise Stays("it runs an activation itself, which comes before the layer after it")
    if not before and pads_with_zeros(other) and scale_and_shift(found)[1].any():
        raise Stays("the layer after it pads with zeros, which would lack what this one adds")
    linear, dim = isinstance(other, nn.Linear), option(layer, "channel_dim", 1)
    sizes = (other.in_features, other.out_features) if linear else (other.in_channels, other.out_channels)
    ranks = ranks if linear else [other.weight.dim()]
    channels = found.adapter.channels(layer)
    if channels != sizes[before] or any(dim % rank != (rank - 1 if linear else 1) for rank in ranks):
        raise Stays(
            f"it normalizes the {channels} channels of dimension {dim}; the layer beside it has "
            f"{sizes[before]} in dimension {-1 if linear else 1}"
        )
