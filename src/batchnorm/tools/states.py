"""Entries of state_dicts: tensors, or NumPy's arrays as federated learning sends them, or anything else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

State = Mapping[str, Any]


def read(models: Iterable[nn.Module | State]) -> tuple[list[State], list[State]]:
    """The state_dicts as they were given; and with tensors in place of NumPy's arrays."""
    given = [model.state_dict() if isinstance(model, nn.Module) else model for model in models]
    if not given:
        raise ValueError("expected at least one model, but there was none")
    for state in given:
        if not isinstance(state, Mapping):
            raise TypeError(
                f"expected modules or state_dicts, whose names say what each entry is, but got {type(state).__name__}; "
                "make a list of arrays one with dict(zip(model.state_dict(), arrays))"
            )
    return given, [{name: _tensor(value) for name, value in state.items()} for state in given]


def _tensor(value: Any) -> Any:
    """A tensor of an array or scalar of NumPy's; anything else as it is."""
    if isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind in "biufc":
        return torch.from_numpy(np.array(value, dtype=value.dtype.newbyteorder("=")))
    return value


def as_given(results: dict[str, Any], given: State) -> dict[str, Any]:
    """The results, as NumPy's arrays or scalars where those were given."""
    return {name: _like(value, given[name]) for name, value in results.items()}


def _like(value: Any, given: Any) -> Any:
    if not isinstance(value, Tensor) or isinstance(given, Tensor):
        return value
    array = value.numpy().astype(given.dtype)
    return array if isinstance(given, np.ndarray) else array[()]


def can_be_averaged(value: Any) -> bool:
    """Whether it holds real or complex numbers: an average of integers or booleans is not of their type."""
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def equal(a: Any, b: Any) -> bool:
    """Whether both are known to be the same."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and bool((a == b.to(a.device)).all())
    try:
        return bool(a == b)
    except (RuntimeError, ValueError):  # tensors or arrays in a container: not comparable
        return False


def kind_of(value: Any) -> str:
    """Its dtype, or its class."""
    return str(value.dtype) if isinstance(value, (Tensor, np.ndarray, np.generic)) else type(value).__name__


def copied(value: Any) -> Any:
    """A tensor of its own; anything else as it is."""
    return value.detach().clone() if isinstance(value, Tensor) else value
