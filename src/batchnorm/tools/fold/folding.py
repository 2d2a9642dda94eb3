"""fold(): a model without the batch-norm layers that are only another scale and bias of the layer beside them."""

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
        folded: of each batch-norm layer that is gone, the layer that does its work now.
        refused: of each that is still there, why.
        error: the largest absolute difference of the two models' outputs on the example inputs, over the largest
            absolute value that the given model returned; None without any.
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
    """A copy of the model in which batch norms are folded into the layers beside them; the given model is untouched.

        conv(x) = W x + b, then bn(y) = s y + t:    W' = s W,  b' = s b + t       s = gamma / sqrt(running_var + eps)
        bn(x) = s x + t, then conv(y) = W y + b:    W' = W s,  b' = W t + b       t = beta - s * running_mean

    W' and b' are computed in float64 and rounded once, to the parameter's dtype. The layers are nn.Linear and the
    convolutions and transposed convolutions of 1 to 3 dimensions, in any number of groups, and subclasses that leave
    their forward as it is. The batch norms are torch.nn's, ours, timm's BatchNormAct2d and frozen look-alikes. In place
    of a layer that is folded there is an nn.Identity, or the activation that it ran itself: other names, other keys of
    the state_dict, the model's class and its forward stay as they are.

    Who feeds whom is read off with torch.fx. Where a forward cannot be traced, its own layers stay, but the modules in
    it are traced one by one, such as an nn.Sequential: it is assumed to run them whole. Arguments that have a default
    are traced with it. A batch norm stays where folding would not be exact, such as before a convolution that pads with
    zeros, and where it cannot be known to be.

    Args:
        model: in eval mode, or with its batch norms frozen; what is in train mode stays. Of a compiled model, or one in
            DistributedDataParallel, the model inside is folded.
        example_inputs: a tensor, a tuple of the forward's arguments, or a dict of them by name. With these the result
            is compared with the model (both in float64 where they run in it), and the inputs' dimensions are known:
            without, a BatchNorm1d beside an nn.Linear is taken to see (N, C).

    Returns:
        The copy. Its attribute `folding`, a `Folding`, says what was folded into what, and why the rest was not.

    Raises:
        RuntimeError: on the example inputs the copy computes something else.
        ValueError: a deep copy of the model is another model.

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
    """Fold what can be, in place. `ranks`: the numbers of dimensions that batch norms were seen to be given."""
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
    """Make the layer an Identity, or what it ran itself, as the same object: so it is, wherever it is referred to."""
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
