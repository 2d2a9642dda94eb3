"""The batch-norm layers of a state_dict, or of a checkpoint file, without the model's code and without unpickling."""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .layer import ITSELF, Array, Layer

MARK = "running_var"
_NAMED = re.compile(r"(?i)(^|[._])(bn|batch_?norm)[0-9a-z]*$")  # bn1, layer.bn, BatchNorm_0
DEPTH = 3  # how deep in a checkpoint a state_dict may lie: {"model": {...}}


def read_checkpoint(path: Path) -> list[Layer]:
    """The layers in a .safetensors file, or in a file that torch.save wrote of tensors and plain values.

    Raises:
        FileNotFoundError: no such file. ValueError: it is neither, holds other objects, which are not unpickled, or no
            batch-norm layer. ModuleNotFoundError: safetensors is not installed.
    """
    if path.suffix == ".safetensors":
        return state_layers(_read_safetensors(path))
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch.load raises whatever a broken file leads it to
        raise ValueError(_refusal(path, error)) from None
    return state_layers(saved)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError, safe_open
    except ModuleNotFoundError:
        raise ModuleNotFoundError("reading .safetensors needs a package: pip install safetensors") from None
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with safe_open(path, "pt") as file:
            names = list(file.keys())
            marked = {name.removesuffix(MARK) for name in names if _is_mark(name)}
            wanted = [name for name in names if name[: len(name) - len(name.rpartition(".")[2])] in marked] or names
            return {name: file.get_tensor(name) for name in wanted}
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file: {error}") from None


def _refusal(path: Path, error: Exception) -> str:
    if isinstance(error, pickle.UnpicklingError) and "weights_only" in str(error).lower():
        return (
            f"{path} holds other objects than tensors, and loading them could run any code: save the weights alone, "
            "torch.save(model.state_dict(), path)"
        )
    return f"{path} is no checkpoint that torch.load reads: {type(error).__name__}"


def state_layers(state: Any) -> list[Layer]:
    """The batch-norm layers in a state_dict, or in whatever dicts are within it.

    Raises:
        ValueError: there is none.
    """
    found = list(_states(state, "", DEPTH))
    layers = [
        _layer(f"{prefix}." * bool(prefix and len(found) > 1) + name.removesuffix(MARK).rstrip("."), tensors, name)
        for prefix, tensors in found
        for name in tensors
        if isinstance(name, str) and _is_mark(name)
    ]
    layers = layers or _without_buffers(state)
    if not layers:
        raise ValueError(
            "found no batch-norm layer with running statistics: expected a state_dict with ...running_var. One of "
            "parameters alone lacks them: save model.state_dict(), which has the buffers"
        )
    return layers


def _without_buffers(state: Any) -> list[Layer]:
    """Layers that are called batch norms and of which there are gamma and beta alone."""
    found: list[Layer] = []
    for prefix, tensors in _dicts(state, "", DEPTH):
        for name, value in tensors.items():
            parent, _, last = str(name).rpartition(".")
            if last == "weight" and _NAMED.search(parent):
                gamma, beta = to_array(value), to_array(tensors.get(f"{parent}.bias"))
                if gamma is not None and beta is not None and len(gamma) == len(beta):
                    found.append(Layer(f"{prefix}.{parent}" if prefix else parent, gamma, beta))
    return found


def _is_mark(name: str) -> bool:
    return name == MARK or name.endswith(f".{MARK}")


def _states(value: Any, prefix: str, depth: int) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The outermost dicts that have running statistics, with their names."""
    inside: list[str] = []
    for name, state in _dicts(value, prefix, depth):
        if any(name == outer or name.startswith(f"{outer}.") or not outer for outer in inside):
            continue
        if any(isinstance(key, str) and _is_mark(key) and isinstance(each, Tensor) for key, each in state.items()):
            inside.append(name)
            yield name, state


def _dicts(value: Any, prefix: str, depth: int) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The dict, and those within it, with their names, outermost first."""
    if isinstance(value, Mapping):
        yield prefix, value
        for name, each in value.items() if depth else ():
            yield from _dicts(each, f"{prefix}.{name}" if prefix else str(name), depth - 1)


def _layer(name: str, tensors: Mapping[str, Any], mark: str) -> Layer:
    prefix = mark.removesuffix(MARK)
    vectors = (to_array(tensors.get(prefix + key)) for key in ("weight", "bias", "running_mean", MARK))
    counter = tensors.get(f"{prefix}num_batches_tracked")
    updates = int(counter) if isinstance(counter, Tensor) and counter.numel() == 1 else None
    return Layer(name or ITSELF, *vectors, updates=updates)


def to_array(tensor: Any) -> Array | None:
    """A (C,) tensor as float64 in NumPy; None for anything else."""
    if not isinstance(tensor, Tensor) or tensor.dim() != 1:
        return None
    return tensor.detach().to("cpu", torch.float64).numpy()
