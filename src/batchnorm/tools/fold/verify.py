"""Whether the folded model computes what the model did, on example inputs."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from ...mixin import BatchNorm


def ranks_seen(model: nn.Module, inputs: Any) -> dict[str, set[int]]:
    """How many dimensions the inputs of each batch norm have."""
    ranks: dict[str, set[int]] = {}
    model = copy.deepcopy(model)
    for name, layer in model.named_modules():
        if isinstance(layer, BatchNorm):
            seen = ranks[name] = set()
            layer.register_forward_pre_hook(lambda _, args, seen=seen: seen.update(x.dim() for x in args[:1]))
    _outputs(model, inputs)
    return ranks


def verified(model: nn.Module, folded: nn.Module, fold_in_place: Callable[[nn.Module], object], inputs: Any) -> float:
    """The largest difference of the two models' outputs; raises if it is the folding's and not rounding's.

    Rounding is next to nothing in float64, so there the folding is judged, by half of the digits: the rest is for what
    the layers in between amplify. A forward that cannot run in float64 is judged by half the digits that it has.
    """
    wide, wide_inputs = copy.deepcopy(model).double(), _pytree.tree_map_only(Tensor, _widened, inputs)
    try:
        expected = _outputs(wide, wide_inputs)
    except Exception:
        wide, wide_inputs = model, inputs
        expected = _outputs(wide, wide_inputs)
    wide = copy.deepcopy(wide)
    fold_in_place(wide)
    for y, z in zip(expected, _outputs(wide, wide_inputs), strict=True):
        largest = y[y.isfinite()].abs().max().item() if y.isfinite().any() else 0.0
        error, tolerance = _difference(y, z), math.sqrt(torch.finfo(y.dtype).eps) * max(1.0, largest)
        if not error <= tolerance:
            raise RuntimeError(
                f"the folded model's output is off by {error:.3g} on the example inputs, of which rounding explains "
                f"{tolerance:.3g} ({y.dtype}). Does some forward decide by its arguments what it calls, or call a "
                "layer inside another module? Then fold the model's parts one by one"
            )
    both = zip(_outputs(model, inputs), _outputs(folded, inputs), strict=True)
    return max((_difference(y, z) for y, z in both), default=0.0)


def _outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    """The floating-point tensors that a copy of the model returns."""
    args, kwargs = ((), inputs) if isinstance(inputs, Mapping) else (inputs, {})
    # What is left to chance is the same each time.
    with torch.no_grad(), torch.random.fork_rng(range(torch.cuda.device_count())):
        y = copy.deepcopy(model)(*((args,) if isinstance(args, Tensor) else args), **kwargs)
    return [t for t in _pytree.tree_leaves(y) if isinstance(t, Tensor) and t.is_floating_point()]


def _widened(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _difference(y: Tensor, z: Tensor) -> float:
    differ = ~((y == z) | (y.isnan() & z.isnan()))
    return (y - z)[differ].abs().max().item() if differ.any() else 0.0
