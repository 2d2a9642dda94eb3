"""A checkpoint on disk: a file of torch.save with a checksum of the whole, of which nothing is used unchecked."""

from __future__ import annotations

import hashlib
import io
import math
import struct
import warnings
import zipfile
from typing import Any

import torch
from torch import Tensor

from .clock import Clock

_MARK = b"sha256:"
_SEAL_BYTES = len(_MARK) + 2 * hashlib.sha256().digest_size


def pack(state: Any) -> bytes:
    """The bytes of a file that `torch.load` reads, and whose end, a comment to a zip archive, is the checksum."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    # An archive ends with the length of its comment, and torch writes none.
    data = buffer.getvalue()[:-2] + struct.pack("<H", _SEAL_BYTES)
    return data + _seal(data)


def unpack(data: bytes) -> Any:
    """What `pack` was given.

    Raises:
        ValueError: not as `pack` made it, or not what plain data and tensors are made of.
    """
    if data[-_SEAL_BYTES:] != _seal(data[:-_SEAL_BYTES]):
        raise ValueError("its checksum is wrong")
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:  # torch would inflate, or read a part many times
            if sum(part.file_size for part in archive.infolist()) > len(data):
                raise ValueError("it holds more than its size")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of an odd pickle torch says more than one line
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # whatever reading can raise
        raise ValueError((str(error) or repr(error)).splitlines()[0]) from None


def _seal(data: bytes) -> bytes:
    return _MARK + hashlib.sha256(data).hexdigest().encode()


def checked(found: Any, like: dict[str, Any], clock: Clock, all_moved: bool) -> dict[str, Any]:
    """`found`, if a training could have written it; its tensors are copies.

    Args:
        found: whatever `unpack` returned.
        like: the state of such a training, with the optimizer as it is after a step.
        clock: of the training.
        all_moved: whether each step moves every parameter, so that the optimizer keeps something of each.
    Raises:
        ValueError: says what cannot be.
    """
    _require(_has_keys(found, like), "it", f"a dict of {', '.join(like)}")
    step = found["step"]
    _require(type(step) is int and 1 <= step <= clock.steps, "step", f"a whole number from 1 to {clock.steps}")
    epoch = step // clock.epoch_steps
    _require(_is_list([found["epoch"]], [epoch]), "epoch", f"{epoch}, that of step {step}")
    _require(_are_floats([found["seconds"]], 1) and 0 <= found["seconds"] < math.inf, "seconds", "a time")
    _require(_are_floats(found["losses"], clock.since_test(step)), "losses", "those of the steps since a test")
    curve = found["curve"]
    _require(_has_keys(curve, like["curve"]), "curve", f"a dict of {', '.join(like['curve'])}")
    tests = clock.tests(step)
    _require(_is_list(curve["step"], tests), "curve", "of every test")
    _require(all(_are_floats(curve[name], len(tests)) for name in curve if name != "step"), "curve", "floats")
    generator = _as_in(like["generator"], found["generator"], "generator")
    try:
        torch.Generator().set_state(generator)
    except RuntimeError:
        raise ValueError("generator is no state of a generator") from None
    tensors = _as_in(like["tensors"], found["tensors"], "tensors")
    optimizer = {"state": _state_as_in(like["optimizer"]["state"], found["optimizer"], step, all_moved)}
    return {**found, "generator": generator, "tensors": tensors, "optimizer": optimizer}


def _state_as_in(like: dict[Any, Any], found: Any, step: int, all_moved: bool) -> dict[Any, Any]:
    _require(isinstance(found, dict) and isinstance(found.get("state"), dict), "optimizer", "a state_dict")
    keys = found["state"].keys()
    _require(keys == like.keys() if all_moved else keys <= like.keys(), "optimizer", "of this model")
    state = {key: _as_in(like[key], found["state"][key], f"optimizer[{key}]") for key in keys}
    steps = [of_one["step"].item() for of_one in state.values() if "step" in of_one]
    _require(all(1 <= its <= step for its in steps), "optimizer", f"after 1 to {step} steps")
    return state


def _as_in(like: Any, found: Any, place: str) -> Any:
    """A copy of `found`, if it has the keys of `like`, and its tensors' dtypes and shapes."""
    if isinstance(like, dict):
        _require(_has_keys(found, like), place, f"a dict of {', '.join(map(str, like))}")
        return {key: _as_in(like[key], found[key], f"{place}[{key!r}]") for key in like}
    _require(type(found) is Tensor and (found.layout, found.device) == (like.layout, like.device), place, "a tensor")
    expected = (like.dtype, like.shape)
    _require((found.dtype, found.shape) == expected, place, f"{like.dtype} of shape {tuple(like.shape)}")
    return torch.empty_like(like).copy_(found)  # as `like` lies in memory: strides, and sharing, may be anything


def _require(holds: bool, place: str, expected: str) -> None:
    if not holds:
        raise ValueError(f"{place} is not {expected}")


def _has_keys(found: Any, like: dict[Any, Any]) -> bool:
    return type(found) is dict and found.keys() == like.keys()


def _is_list(found: Any, expected: list[int]) -> bool:
    """Whether they are these whole numbers: types first, for tensors compare by element."""
    return type(found) is list and all(type(number) is int for number in found) and found == expected


def _are_floats(found: Any, length: int) -> bool:
    return type(found) is list and len(found) == length and all(type(number) is float for number in found)
