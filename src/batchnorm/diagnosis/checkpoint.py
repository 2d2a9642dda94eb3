"""The batch-norm layers of a state_dict, or of a checkpoint file, without the model's code and without unpickling."""

from __future__ import annotations

import math
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..runs.parse import check_regular, check_size
from .layer import ITSELF, Array, Layer

MARK = "running_var"
_NAMED = re.compile(r"(?i)(^|[._])(bn|batch_?norm)[0-9a-z]*$")  # bn1, layer.bn, BatchNorm_0
MOST_REPEATED = 1 << 20
DEPTH = 3  # how deep in a checkpoint a state_dict may lie: {"model": {...}}


def read_checkpoint(path: Path) -> list[Layer]:
    """The layers in a .safetensors file, or in a file that torch.save wrote of tensors and plain values.

    Raises:
        FileNotFoundError: no such file. ValueError: it is neither, it holds other objects, which are not unpickled, or
            it has no batch-norm layer. ModuleNotFoundError: safetensors is not installed.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        check_regular(path)
        return state_layers(_read_safetensors(path) if path.suffix == ".safetensors" else _read_saved(path))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _read_saved(path: Path) -> Any:
    try:
        unpacked = _unpacked_size(path)
    except Exception as error:  # like torch.load, zipfile raises whatever a broken file leads it to
        raise ValueError(_refusal(error)) from None
    if unpacked > path.stat().st_size:
        check_size(unpacked, "what it unpacks to")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of kinds of tensors that are refused below
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        if isinstance(error, OSError) and error.filename:
            raise
        raise ValueError(_refusal(error)) from None


def _unpacked_size(path: Path) -> int:
    """Bytes of what is in the zip file that torch.save writes, as its directory says; 0 of what is none."""
    if not zipfile.is_zipfile(path):
        return 0
    with zipfile.ZipFile(path) as archive:
        return sum(member.file_size for member in archive.infolist())


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError, safe_open
    except ModuleNotFoundError:
        raise ModuleNotFoundError("reading .safetensors needs a package: pip install safetensors") from None
    try:
        with safe_open(path, "pt") as file:
            names = list(file.keys())
            marked = {name.removesuffix(MARK) for name in names if _is_mark(name)}
            wanted = [name for name in names if name[: len(name) - len(name.rpartition(".")[2])] in marked] or names
            return {name: file.get_tensor(name) for name in wanted}
    except (SafetensorError, AttributeError, TypeError) as error:  # the last two of a dtype that torch does not have
        raise ValueError(f"no safetensors file: {error}") from None


def _refusal(error: Exception) -> str:
    if isinstance(error, pickle.UnpicklingError) and "weights_only" in str(error).lower():
        return (
            "it holds objects other than tensors, and loading them could run any code: save only the weights, "
            "torch.save(model.state_dict(), path)"
        )
    return f"torch.load cannot read it as a checkpoint: {type(error).__name__}"


def state_layers(state: Any) -> list[Layer]:
    """The batch-norm layers in a state_dict, or in whatever dicts are within it.

    Raises:
        ValueError: there is none, or one whose vectors are not plain numbers.
    """
    found = list(_states(state, "", DEPTH))
    vectors = (each for _, tensors in found for mark in _marks(tensors) for each in _vectors(tensors, mark).values())
    check_size(sum(_size(each) for each in vectors), "the vectors of its batch norms")
    layers = [
        _layer(f"{prefix}." * bool(prefix and len(found) > 1) + name.removesuffix(MARK).rstrip("."), tensors, name)
        for prefix, tensors in found
        for name in _marks(tensors)
    ]
    layers = layers or _without_buffers(state)
    if not layers:
        raise ValueError(
            "expected a state_dict with ...running_var, but found no batch-norm layer with those. A dict of "
            "only the parameters lacks them: save model.state_dict(), which has the buffers too"
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


def _marks(tensors: Mapping[Any, Any]) -> Iterator[str]:
    return (name for name in tensors if isinstance(name, str) and _is_mark(name))


def _is_mark(name: str) -> bool:
    return name == MARK or name.endswith(f".{MARK}")


def _states(value: Any, prefix: str, depth: int) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The outermost dicts that have running statistics, with their names."""
    inside: list[str] = []
    for name, state in _dicts(value, prefix, depth):
        if any(name == outer or name.startswith(f"{outer}.") or not outer for outer in inside):
            continue
        if any(isinstance(state[mark], Tensor) for mark in _marks(state)):
            inside.append(name)
            yield name, state


def _dicts(value: Any, prefix: str, depth: int) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The dict, and those within it, each once, with their names, outermost first."""
    seen: set[int] = set()  # a dict may be in itself
    level = [(prefix, value)]
    for _ in range(depth + 1):
        dicts = [(name, each) for name, each in level if isinstance(each, Mapping)]
        dicts = [(name, each) for name, each in dicts if id(each) not in seen and not seen.add(id(each))]
        yield from dicts
        level = [(f"{name}.{key}" if name else str(key), inner) for name, each in dicts for key, inner in each.items()]


def _layer(name: str, tensors: Mapping[str, Any], mark: str) -> Layer:
    vectors = (to_array(vector, entry) for entry, vector in _vectors(tensors, mark).items())
    counter = tensors.get(f"{mark.removesuffix(MARK)}num_batches_tracked")
    return Layer(name or ITSELF, *vectors, updates=_count(counter))


def _vectors(tensors: Mapping[str, Any], mark: str) -> dict[str, Any]:
    prefix = mark.removesuffix(MARK)
    return {prefix + key: tensors.get(prefix + key) for key in ("weight", "bias", "running_mean", MARK)}


def _size(value: Any) -> int:
    """Bytes that `to_array` takes."""
    return 8 * value.numel() if isinstance(value, Tensor) and value.dim() == 1 else 0


def _count(counter: Any) -> int | None:
    """What a counter of batches says; None where it is no whole number of at least 0."""
    if not isinstance(counter, Tensor) or counter.numel() != 1 or _oddity(counter):
        return None
    said = counter.item()
    return int(said) if math.isfinite(said) and said >= 0 else None


def _oddity(tensor: Tensor) -> str | None:
    """Why a tensor does not hold real numbers that can be read one by one; None where it does."""
    if tensor.layout is not torch.strided:
        return f"of layout {tensor.layout}"
    if tensor.is_quantized or tensor.is_complex():
        return f"of dtype {tensor.dtype}"
    if tensor.is_meta:
        return "a meta tensor, which has no values"
    return None


def to_array(tensor: Any, name: str = "a vector of a batch norm") -> Array | None:
    """A (C,) tensor as float64 in NumPy; None for what is no tensor, or of another shape.

    Raises:
        ValueError: a sparse, quantized, complex or meta tensor; or one number a million times.
    """
    if not isinstance(tensor, Tensor) or tensor.dim() != 1:
        return None
    oddity = _oddity(tensor)
    if oddity is None and tensor.stride(0) == 0 and len(tensor) > MOST_REPEATED:
        oddity = f"one number {len(tensor):,} times"
    if oddity:
        raise ValueError(f"{name} must hold one real number per channel, but is {oddity}")
    return tensor.detach().to("cpu", torch.float64).numpy()
