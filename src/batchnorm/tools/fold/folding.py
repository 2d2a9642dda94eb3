"""fold(): a model whose batch norms are folded into the weights of neighboring layers."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import nn

from ...model.find import Found, bare, classes_of, find
from ...model.run import copied
from .calls import Calls
from .neighbors import Stays, check, neighbor
from .verify import ranks_seen, verified
from .weights import folded_into

Model = TypeVar("Model", bound=nn.Module)


@dataclass
class Folding:
    """What `fold` did.

    Attributes:
        folded: for each removed batch-norm layer, the layer that does its work now.
        refused: for each remaining one, the reason.
        error: the largest absolute difference between the outputs of the two models on the example inputs, divided by
            the largest absolute output of the given model; None without example inputs.
    """

    folded: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    error: float | None = None

    def __str__(self) -> str:
        lines = [f"{name}: folded into {into}" for name, into in self.folded.items()]
        lines += [f"{name}: stays: {reason}" for name, reason in self.refused.items()]
        if self.error is not None:
            lines.append(f"largest error on the example, over the largest output: {self.error:.2g}")
        return "\n".join(lines)


def fold(model: Model, example_inputs: Any = None) -> Model:
    """Return a copy of the model with batch norms folded into the neighboring layers; the given model is not changed.

        conv(x) = W x + b, then bn(y) = s y + t:    W' = s W,  b' = s b + t       s = gamma / sqrt(running_var + eps)
        bn(x) = s x + t, then conv(y) = W y + b:    W' = W s,  b' = W t + b       t = beta - s * running_mean

    W' and b' are computed in float64 and rounded once, to the parameter's dtype. The layers are nn.Linear and the
    convolutions and transposed convolutions of 1 to 3 dimensions, in any number of groups, and subclasses that leave
    their forward as it is. The batch norms are torch.nn's, ours, timm's BatchNormAct2d and frozen look-alikes. An
    nn.Identity, or the activation that the layer ran itself, replaces a folded layer. All other names and state_dict
    keys, the model's class and its forward stay as they are.

    torch.fx shows which layer feeds which. If a forward cannot be traced, the layers that it calls itself stay, and its
    child modules are traced one by one, on the assumption that it runs each of them whole (an nn.Sequential, for
    example). Arguments with a default are traced with that default. A batch norm stays if folding would not be exact,
    for example before a convolution that pads with zeros, or is not known to be exact.

    Args:
        model: in eval mode, or with frozen batch norms; a batch norm in train mode stays. For a compiled model, or one
            in DistributedDataParallel, the inner model is folded.
        example_inputs: a tensor, a tuple of the forward's arguments, or a dict of them by name. With these, the result
            is compared with the model (both in float64 if they can run in it), and the dimensions of every input are
            known. Without them, a BatchNorm1d beside an nn.Linear is assumed to get (N, C).

    Returns:
        The copy. Its attribute `folding`, a `Folding`, lists what was folded into what, and why the rest was not.

    Raises:
        RuntimeError: the copy's output differs on the example inputs.
        ValueError: a deep copy of the model differs from the model.

    Warns:
        UserWarning: the model has no batch norm.

    Source: Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
        Inference", section 3.2.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.BatchNorm2d(8))
        >>> fold(model.eval())
        Sequential(
          (0): Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1))
          (1): Identity()
          (2): ReLU()
          (3): BatchNorm2d(8, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True)
        )
        >>> fold(model, torch.randn(2, 3, 8, 8)).folding.folded
        {'1': '0'}
    """
    model = bare(model)  # pyright: ignore[reportAssignmentType]
    if not find(model):
        warnings.warn(f"nothing to fold: the model has no batch norm; it has {classes_of(model)}", stacklevel=2)
    folded = copied(model)
    ranks = {} if example_inputs is None else ranks_seen(model, example_inputs)
    folding = fold_in_place(folded, ranks)
    if example_inputs is not None:
        folding.error = verified(model, folded, lambda wide: fold_in_place(wide, ranks), example_inputs)
    folded.folding = folding  # pyright: ignore[reportArgumentType]
    return folded


def fold_in_place(model: nn.Module, ranks: Mapping[str, set[int]]) -> Folding:
    """Fold what can be folded, in place. `ranks`: how many dimensions each batch norm's inputs were seen to have."""
    folding, calls = Folding(), Calls(model)
    names: dict[Any, str] = {module: name for name, module in model.named_modules()}
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values())
    for found in find(model):
        layer, name, reasons = found.layer, found.name, []
        for before in (True, False):
            try:
                other = neighbor(found, calls, before)
                check(found, other, calls, owners, before, ranks.get(name) or [_usual_rank(layer)])
                weight, bias = folded_into(found, other, before)
                if not (weight.isfinite().all() and bias.isfinite().all()):
                    raise Stays(f"the folded weight or bias would not be finite in {weight.dtype}")
            except Stays as stays:
                reasons += [str(stays)] if str(stays) not in reasons else []
                continue
            other.weight, other.bias = weight, bias
            _remove(found, calls)
            folding.folded[name] = names[other]
            break
        else:
            folding.refused[name] = "; and ".join(reasons)
    return folding


def _usual_rank(layer: nn.Module) -> int:
    return 5 if isinstance(layer, nn.BatchNorm3d) else 4 if isinstance(layer, nn.BatchNorm2d) else 2


def _remove(found: Found, calls: Calls) -> None:
    """Turn the layer object itself into an Identity, or into what it ran, so that every reference sees the change."""
    layer, after = found.layer, found.adapter.after(found.layer)
    if not after:
        for node in calls.of.pop(layer):
            calls.remove(node)
    instead = after[0] if len(after) == 1 else nn.Sequential(*after) if after else nn.Identity()
    training = layer.training
    layer.__class__ = type(instead)
    layer.__dict__.clear()
    layer.__dict__.update(instead.__dict__)
    if len(after) != 1:
        layer.training = training
