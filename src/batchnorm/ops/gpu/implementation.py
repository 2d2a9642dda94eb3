"""The operators of `schema.py` for tensors on a GPU: checked, on kernels that are trusted, else on plain operators.

Plain operators serve virtual batches, empty batches, rows of more than 2^30 values, and all that the kernels are not
trusted with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...activations import of_code
from .. import plain
from ..plain import Operands, Settings
from . import available, trust
from .arguments import check
from .layout import is_too_long

OPERATORS = (
    "forward", "forward_", "infer", "measure", "normalize", "reduce", "apply", "backward", "update_running_"
)  # fmt: skip
MOVED = ("running_mean", "running_var", "batches")
_VECTORS = ("weight", "bias", "running_mean", "running_var", "statistics", "sums")


def register(library: torch.library.Library) -> None:
    """Give the schema's operators these implementations, for CUDA's dispatch key, which is ROCm's too."""
    for name in OPERATORS:
        library.impl(name, _implemented(name), "CUDA")


def _implemented(name: str) -> Callable[..., Any]:
    arguments = getattr(torch.ops.batchnorm, name).default._schema.arguments
    names = [argument.name for argument in arguments]
    defaults = {argument.name: argument.default_value for argument in arguments if argument.has_default_value()}

    def implementation(*args: Any, **kwargs: Any) -> Any:
        given = {**defaults, **dict(zip(names, args, strict=False)), **kwargs}
        return call(name, given)

    return implementation


def call(name: str, given: dict[str, Any]) -> Any:
    """What the operator returns; given by name, defaults included."""
    check(name, given)
    first = given["x"] if "x" in given else given["statistics"]
    if first.numel() == 0 or given.get("virtual_batch"):
        return by_plain(name, given)
    if available.why_not(first.device) is not None or ("x" in given and is_too_long(first)):
        return by_plain(name, given)
    if available.is_proved(first.device):
        return by_kernels(name, given)
    return trust.call(name, given, by_kernels, by_plain)


def by_kernels(name: str, given: dict[str, Any]) -> Any:
    """The operator on Triton's kernels."""
    from . import operators

    given = {key: value for key, value in given.items() if key != "virtual_batch"}
    back = _contiguous(given)
    result = getattr(operators, name)(**given)
    for tensor, moved in back:
        tensor.copy_(moved)
    return result


def by_plain(name: str, given: dict[str, Any]) -> Any:
    """The operator on PyTorch's own."""
    if name == "update_running_":
        mean, var, statistics = given["running_mean"], given["running_var"], given["statistics"]
        return plain.track(mean, var, statistics, given["momentum"], given["unbiased"], given["skip_nonfinite"])
    operands = Operands(given["x"], *(given.get(part) for part in Operands._fields[1:]))
    if name == "measure":
        return plain.measure(operands.x, operands.mask, given["virtual_batch"])
    settings = Settings(given["eps"], of_code(given["act"], given["slope"]), given.get("virtual_batch", 0))
    if name == "infer":
        return plain.infer(operands, given["running_mean"], given["running_var"], settings, given["keep"])
    if name == "forward":
        return plain.forward(operands, settings)
    if name == "forward_":
        return _forward_(operands, settings, given)
    statistics = given["statistics"]
    if name == "normalize":
        return plain.normalize(operands, statistics, settings)
    if name == "reduce":
        return plain.reduce(given["dy"], operands, given["y"], statistics, settings)
    wanted = given["need_dx"], given["need_dresidual"]
    if name == "apply":
        return plain.apply(given["dy"], operands, given["y"], statistics, given["sums"], settings, *wanted)
    return plain.backward(given["dy"], operands, given["y"], statistics, settings, given["measured"], *wanted)


def _forward_(operands: Operands, settings: Settings, given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    y, statistics = plain.forward(operands, settings)
    mean, var, batches = (given[part] for part in MOVED)
    if mean is not None and var is not None:
        plain.track(mean, var, statistics, given["momentum"], given["unbiased"], given["skip_nonfinite"])
    if batches is not None:
        batches.add_(1)
    return y, statistics


def _contiguous(given: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
    """Make vectors and rows contiguous in place; returns what has to be copied back, and from where."""
    back = []
    for name in _VECTORS:
        value = given.get(name)
        if value is not None and not value.is_contiguous():
            given[name] = value.contiguous()
            if name in MOVED:
                back.append((value, given[name]))
    return back
