"""Whether the folded model computes what the model did, on example inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from ...model.find import find
from ...model.run import copied, undisturbed


def ranks_seen(model: nn.Module, inputs: Any) -> dict[str, set[int]]:
    """How many dimensions the inputs of each batch norm have."""
    ranks: dict[str, set[int]] = {}
    handles = []
    for found in find(model):
        seen = ranks[found.name] = set()
        hook = found.layer.register_forward_pre_hook(lambda _, args, seen=seen: seen.update(x.dim() for x in args[:1]))
        handles.append(hook)
    try:
        _outputs(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return ranks


def verified(model: nn.Module, folded: nn.Module, fold_in_place: Callable[[nn.Module], object], inputs: Any) -> float:
    """Return the outputs' largest difference over the given model's largest output; raise if it is too large.

    Folding is judged in float64, where rounding is negligible: half of the digits must agree, since the layers in
    between amplify rounding. A forward that cannot run in float64 must agree in half the digits of its dtype. That
    comparison uses copies of both models. So the folded copy is also compared with the given model itself, in its own
    dtype, where a third of the digits must agree.
    """
    given = _outputs(model, inputs), _outputs(folded, inputs)
    error = _relative(*given, 1 / 3)
    try:
        wide, wide_inputs = copied(model).double(), _pytree.tree_map_only(Tensor, _widened, inputs)
        expected = _outputs(wide, wide_inputs)
    except Exception:  # a forward with a fixed dtype in it
        return _relative(*given, 1 / 2)
    fold_in_place(wide)
    _relative(expected, _outputs(wide, wide_inputs), 1 / 2)
    return error


def _relative(expected: list[Tensor], found: list[Tensor], digits: float) -> float:
    """The largest relative error of any output; raises where it is over eps to the power of `digits`."""
    errors = [0.0]
    for y, z in zip(expected, found, strict=True):
        largest = y[y.isfinite()].abs().max().item() if y.isfinite().any() else 0.0
        error, tolerance = _difference(y, z) / (largest or 1.0), torch.finfo(y.dtype).eps ** digits
        if not error <= tolerance:
            raise RuntimeError(
                f"the folded model must compute what the given one does, but differs by {error:.3g} of the largest "
                f"output on the example inputs; rounding explains {tolerance:.3g} ({y.dtype}). Does a forward use "
                "its arguments to choose what it calls, or call a layer inside another module? Then fold the model's "
                "parts one by one"
            )
        errors.append(error)
    return max(errors)


def _outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    """The floating-point tensors that the model returns; it is left as it was."""
    args, kwargs = ((), inputs) if isinstance(inputs, Mapping) else (inputs, {})
    # Both models draw the same random numbers, because the random state is restored.
    with undisturbed(model):
        y = model(*((args,) if isinstance(args, Tensor) else args), **kwargs)
    return [t.clone() for t in _pytree.tree_leaves(y) if isinstance(t, Tensor) and t.is_floating_point()]


def _widened(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _difference(y: Tensor, z: Tensor) -> float:
    differ = ~((y == z) | (y.isnan() & z.isnan()))
    return (y - z)[differ].abs().max().item() if differ.any() else 0.0
