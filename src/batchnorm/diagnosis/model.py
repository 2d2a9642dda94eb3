"""The batch-norm layers of a model as they stand, and where they are in it, without running it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..model.adapters import adapter_of
from ..model.adapters.adapter import is_lazy
from ..model.find import Found, bare, require
from ..nn.frozen import Frozen
from .checkpoint import to_array
from .layer import ITSELF, Layer, Place, Settings

_CONVOLUTIONS = nn.modules.conv._ConvNd
_RECTIFIERS = (nn.ReLU, nn.ReLU6)


class Leaf(NamedTuple):
    """A module without children, or a batch norm; those of one chain run one after the other, as in a Sequential."""

    name: str
    module: nn.Module
    chain: int


def model_layers(model: nn.Module, optimizer: Optimizer | None = None) -> list[tuple[Layer, nn.Module]]:
    """Every batch norm of the model, whatever its class, in model order, with its module.

    Raises:
        ValueError: there is none, or a lazy one that has seen no batch.
    """
    model = bare(model)
    found = {each.layer: each for each in require(model, "diagnose")}
    leaves = list(_leaves(model, "", [0]))
    layers: list[tuple[Layer, nn.Module]] = []
    for i, leaf in enumerate(leaves):
        if leaf.module not in found:
            continue
        if is_lazy(leaf.module):
            raise ValueError(f"layer {leaf.name!r} is lazy and has not seen a batch: run one forward first")
        before = leaves[i - 1] if i else None
        after = leaves[i + 1] if i + 1 < len(leaves) else None
        place = _place(model, found[leaf.module], leaf, before, after, optimizer)
        layers.append((_describe(found[leaf.module], place), leaf.module))
    return layers


def _describe(found: Found, place: Place) -> Layer:
    layer, adapter = found.layer, found.adapter
    counter = adapter.batches(layer)
    return Layer(
        found.name or ITSELF,
        *(to_array(vector) for vector in (layer.weight, layer.bias, layer.running_mean, layer.running_var)),
        updates=None if counter is None else int(counter),
        settings=Settings(found.kind, adapter.eps(layer), adapter.momentum(layer), adapter.tracks(layer)),
        place=place,
    )


def _place(
    model: nn.Module,
    found: Found,
    leaf: Leaf,
    before: Leaf | None,
    after: Leaf | None,
    optimizer: Optimizer | None,
) -> Place:
    layer, learns = found.layer, found.adapter.learns
    learned = [parameter for parameter in (layer.weight, layer.bias) if parameter is not None]
    frozen = not learns or (isinstance(layer, Frozen) and "stats" in layer.frozen)
    known = before is not None and before.chain == leaf.chain
    width = _width(before.module) if before else None
    fits = width == found.adapter.channels(layer)
    decay, undecayed = _decay(optimizer, learned)
    return Place(
        training=layer.training and learns,
        model_training=model.training,
        frozen=frozen,
        learns=not learned or any(parameter.requires_grad for parameter in learned),
        decay=decay,
        undecayed=undecayed,
        before=before.name if before and (known or fits) else None,
        before_kind=type(before.module).__name__ if before else "",
        has_bias=fits and getattr(before and before.module, "bias", None) is not None,
        surely=known,
        rectified=_rectified(found, after if after and after.chain == leaf.chain else None),
        wrong_axis=known and before is not None and isinstance(before.module, nn.Linear) and not fits,
        width=width,
    )


def _width(module: nn.Module) -> int | None:
    """How many features a module that can have a bias gives out."""
    if isinstance(module, nn.Linear):
        return module.out_features
    return module.out_channels if isinstance(module, _CONVOLUTIONS) else None


def _rectified(found: Found, after: Leaf | None) -> bool | None:
    own = found.adapter.after(found.layer)
    if own:
        return isinstance(own[-1], _RECTIFIERS)
    return None if after is None else isinstance(after.module, _RECTIFIERS)


def _decay(optimizer: Optimizer | None, learned: list[nn.Parameter]) -> tuple[float, str]:
    """The weight decay of these parameters, and Python that makes the optimizer without it."""
    own = {id(parameter) for parameter in learned}
    for group in optimizer.param_groups if optimizer else []:
        decay = float(group.get("weight_decay") or 0)
        if decay and own & {id(parameter) for parameter in group["params"]}:
            return decay, _undecayed(optimizer, group, decay)
    return 0.0, ""


def _undecayed(optimizer: Any, group: dict[str, Any], decay: float) -> str:
    """As the optimizer is, with all its options that are not the usual ones, but without decay of gamma and beta."""
    cls = type(optimizer)
    options = []
    for name, parameter in inspect.signature(cls).parameters.items():
        value = group.get(name, parameter.default)
        value = value.item() if isinstance(value, Tensor) else value
        if name not in ("params", "weight_decay") and (value != parameter.default or name == "lr"):
            options.append(f"{name}={value!r}")
    made = f"torch.optim.{cls.__name__}" if getattr(torch.optim, cls.__name__, None) is cls else "type(optimizer)"
    return f"optimizer = {made}({', '.join([f'bn.param_groups(model, {decay:g})', *options])})  # before training"


def _leaves(module: nn.Module, name: str, chain: list[int]) -> Iterator[Leaf]:
    """In order of definition. `chain` counts: what is not in a Sequential begins another."""
    children = list(module.named_children())
    if not children or adapter_of(module):
        yield Leaf(name, module, chain[0])
        return
    for child_name, child in children:
        if not isinstance(module, nn.Sequential):
            chain[0] += 1
        yield from _leaves(child, f"{name}.{child_name}" if name else child_name, chain)
    if not isinstance(module, nn.Sequential):
        chain[0] += 1
