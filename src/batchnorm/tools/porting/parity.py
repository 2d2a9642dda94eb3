"""check(): compare a layer with its original, and name the convention that may be wrong."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...mixin import BatchNorm, option
from ...model.convert import convert

Batches = list[Tensor]


@dataclass(frozen=True)
class Parity:
    """How far a layer is from its original.

    Attributes:
        layer: its name.
        error: the largest absolute difference between outputs, in training and in eval mode.
        tolerance: what rounding explains.
        explanation: if the error is larger, the one or two conventions whose change would bring it within the
            tolerance.
    """

    layer: str
    error: float
    tolerance: float
    explanation: str = ""

    @property
    def ok(self) -> bool:
        """Whether the layer does what its original does."""
        return self.error <= self.tolerance

    def __str__(self) -> str:
        said = "the same" if self.ok else self.explanation
        return f"{self.layer:20}  {self.error:9.2g}  {self.tolerance:9.2g}  {said}"


class ParityTable(list[Parity]):
    """The layers that were compared; as text, a table."""

    @property
    def ok(self) -> bool:
        """Whether every layer does what its original does."""
        return all(row.ok for row in self)

    def __str__(self) -> str:
        return "\n".join([f"{'layer':20}  {'error':>9}  {'tolerance':>9}", *map(str, self)])


def check(layer: Any, reference: Any, x: Any, *, training: Any = ()) -> ParityTable:
    """Compare layers with their originals: batch by batch in training, if batches are given, then in eval mode.

    If they differ, name the one or two conventions whose change in the layer would make them agree: momentum or decay,
    eps, biased or unbiased running variance, axis, order of gamma and beta, mode.

    Args:
        layer: a batch norm, or several by name. Copies are used, so they are not changed.
        reference: the original, a function of (x, training) such as a Keras layer. It is called with each batch of
            `training`, which trains it, and then with x. Without `training` it may be the original's output for x.
            Several by name.
        x: the input for both in eval mode, an array or tensor. Several by name.
        training: batches; enough of them to show how the running statistics are tracked. Several by name.

    Returns:
        One row per layer; prints as a table.

    Raises:
        KeyError: with several layers, a reference or input is missing.

    Example:
        >>> original = nn.BatchNorm1d(3, momentum=0.1)
        >>> def reference(x, training):
        ...     return original.train(training)(x)
        >>> batches = [torch.randn(8, 3) + 5 for _ in range(5)]
        >>> check(bn.BatchNorm1d(3, momentum=0.9), reference, batches[0], training=batches)[0].explanation
        'it would agree with momentum=0.1 (Keras and Flax call momentum what is 1 - momentum in PyTorch)'
    """
    if not isinstance(layer, Mapping):
        name = "the layer"
        layer, reference, x, training = {name: layer}, {name: reference}, {name: x}, {name: training}
    batches = dict(training)
    return ParityTable(
        _compare(name, one, reference[name], x[name], batches.get(name, ())) for name, one in layer.items()
    )


def _compare(name: str, layer: BatchNorm, reference: Any, x: Any, training: Sequence[Any]) -> Parity:
    if callable(reference):
        outputs = [*(reference(batch, True) for batch in training), reference(x, False)]
    else:
        outputs = [reference]
    expected, given = [_tensor(y) for y in outputs], [_for_layer(layer, batch) for batch in (*training, x)]
    error, tolerance = _error(layer, expected, given), _tolerance(layer, expected, given)
    if error <= tolerance:
        return Parity(name, error, tolerance)
    for together in (1, 2):
        explained = []
        for some in combinations(_otherwise(layer, given[-1]), together):
            other = copy.deepcopy(layer) if hasattr(layer, "unbiased") else convert(copy.deepcopy(layer))
            for name_, value in (pair for _, changes in some for pair in changes.items()):
                setattr(other, name_, value)
            if _error(other, expected, given) <= tolerance:
                explained.append(" and ".join(words for words, _ in some))
        if explained:
            return Parity(name, error, tolerance, f"it would agree with {', or '.join(explained)}")
    return Parity(name, error, tolerance, "no change of one or two conventions explains it")


def _otherwise(layer: BatchNorm, x: Tensor) -> Iterator[tuple[str, dict[str, Any]]]:
    """The conventions that may have been mistaken: what to say if it was that, and the attributes to have instead."""
    if layer.momentum is not None:
        momentum = round(1 - layer.momentum, 12)
        words = f"momentum={momentum:g} (Keras and Flax call momentum what is 1 - momentum in PyTorch)"
        yield words, {"momentum": momentum}
    for eps, whose in ((1e-3, " (Keras's default)"), (1e-5, " (PyTorch's and Flax's default)"), (1e-6, ""), (1e-8, "")):
        if eps != layer.eps:
            yield f"eps={eps:g}{whose}", {"eps": eps}
    unbiased: bool = option(layer, "unbiased", True)
    words = "the biased variance tracked (as Keras and Flax do)"
    yield words if unbiased else "the unbiased variance tracked (as PyTorch does)", {"unbiased": not unbiased}
    here: int = option(layer, "channel_dim", 1)
    for dim in range(1, x.dim()):
        if dim != here % x.dim() and x.size(dim) == layer.num_features:
            yield f"channel_dim={dim}", {"channel_dim": dim}
    if layer.weight is not None and layer.bias is not None:
        yield "gamma and beta exchanged", {"weight": layer.bias, "bias": layer.weight}
    yield "train mode (the original normalizes with the batch)", {"running_mean": None, "running_var": None}


@torch.no_grad()
def _error(layer: BatchNorm, expected: Batches, given: Batches) -> float:
    """The largest difference: infinite where the layer does not take the input, or NaN is on one side only."""
    layer = copy.deepcopy(layer)
    try:
        outputs = [*(layer.train()(batch).cpu() for batch in given[:-1]), layer.eval()(given[-1]).cpu()]
    except (ValueError, RuntimeError):
        return math.inf
    return max(map(_difference, outputs, expected))


def _difference(y: Tensor, z: Tensor) -> float:
    if y.shape != z.shape:
        return math.inf
    y, z = y.double(), z.double()
    difference = (y - z).abs().nan_to_num(math.inf)[~((y == z) | (y.isnan() & z.isnan()))]
    return difference.max().item() if difference.numel() else 0.0


def _tolerance(layer: BatchNorm, expected: Batches, given: Batches) -> float:
    """What rounding explains, with some eight operations a value.

    - A difference x - mean has the rounding of x, which may be much larger than it.
    - A variance computed as E[x^2] - E[x]^2, as some do, has that of mean^2, so the relative error mean^2 / var.
    - Running statistics are rounded at each step, up or down, and that fades as they do: 1 / momentum steps count.
    """
    assert layer.running_var is not None
    eps = max(torch.finfo(t.dtype).eps for t in (*expected, *given) if t.is_floating_point())
    gain = torch.rsqrt(layer.running_var.double() + layer.eps)
    if layer.weight is not None:
        gain = gain * layer.weight.abs().double()
    scale = max(map(_largest, expected)) + _largest(gain) * max(map(_largest, given))
    canceled = 0.0
    for batch in given[:-1]:
        dim = option(layer, "channel_dim", 1) % batch.dim()
        var, mean = torch.var_mean(batch.double(), [d for d in range(batch.dim()) if d != dim], correction=0)
        canceled = max(canceled, _largest(mean.square() / (var + layer.eps)))
    steps = min(len(given) - 1, 1 / layer.momentum if layer.momentum else 0)
    return 8 * eps * (scale * (1 + math.sqrt(steps)) + canceled * max(map(_largest, expected)))


def _largest(tensor: Tensor) -> float:
    tensor = tensor[tensor.isfinite()]
    return tensor.abs().max().item() if tensor.numel() else 0.0


def _tensor(array: Any) -> Tensor:
    return array.detach().cpu() if isinstance(array, Tensor) else torch.from_numpy(np.array(array))


def _for_layer(layer: BatchNorm, array: Any) -> Tensor:
    """The input as the layer takes it: on its device, and not wider than it."""
    assert layer.running_mean is not None
    tensor = _tensor(array).to(layer.running_mean.device)
    return tensor.to(layer.running_mean.dtype) if tensor.dtype == torch.float64 else tensor
