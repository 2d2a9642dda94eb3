"""Whether the Triton kernels serve a GPU, and why not: the device, Triton, where they were proved, and who says no.

The answer does not import Triton. It is the same for all ranks on one kind of machine, and changes only by `distrust`.
"""

from __future__ import annotations

import json
import os
import warnings
from functools import lru_cache
from importlib import metadata
from pathlib import Path

import torch

SWITCH = "BATCHNORM_GPU"
OLDEST = (3, 6)  # the Triton version of the oldest supported torch
PROVED = Path(__file__).with_name("proved.json")
_NAMES = ("triton", "pytorch-triton", "pytorch-triton-rocm", "triton-rocm", "triton-windows")
_distrusted: list[str] = []  # why, once a kernel was seen to be wrong


def why_not(device: torch.device) -> str | None:
    """Why the kernels do not serve tensors on the device; None if they do."""
    return _distrusted[0] if _distrusted else why_off(device)


def why_off(device: torch.device) -> str | None:
    """The same, without what this process has found out about the kernels; ranks agree on this answer."""
    return _why_off(device.index or 0)


# torch.compile treats the result as a constant, as with torch.compiler.assume_constant_result, which would import the
# compiler.
why_not._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]
why_off._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def is_proved(device: torch.device) -> bool:
    """Whether a committed run proved the kernels on such a device with such a Triton; else they check themselves."""
    return _is_proved(device.index or 0)


def distrust(reason: str) -> None:
    """Never use the kernels again in this process; warns once."""
    if not _distrusted:
        _distrusted.append(f"a kernel gave a wrong result: {reason}")
        warnings.warn(
            f"batchnorm switches its GPU kernels off, because one of them gave a wrong result: {reason}. PyTorch's "
            "own operators are used instead. Please run `batchnorm check-gpu --out check.json`, and send us the file.",
            RuntimeWarning,
            stacklevel=2,
        )


def architecture(index: int = 0) -> str:
    """A GPU's architecture, such as sm_90 or gfx942."""
    if torch.version.hip:
        return torch.cuda.get_device_properties(index).gcnArchName.partition(":")[0]
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


@lru_cache
def triton_version() -> tuple[int, int] | None:
    """Major and minor; None where it is not installed."""
    for name in _NAMES:
        try:
            major, minor, *_ = metadata.version(name).split(".")
        except metadata.PackageNotFoundError:
            continue
        return int(major), int(minor)
    return None


def proved() -> set[tuple[str, str]]:
    """The pairs of architecture and Triton's minor version on which committed runs proved the kernels."""
    return {(pair["architecture"], pair["triton"]) for pair in json.loads(PROVED.read_text())}


@lru_cache
def _is_proved(index: int) -> bool:
    version = triton_version()
    return version is not None and (architecture(index), f"{version[0]}.{version[1]}") in proved()


@lru_cache
def _why_off(index: int) -> str | None:
    switch = os.environ.get(SWITCH)
    if switch == "0":
        return f"{SWITCH}=0 switches the kernels off"
    version = triton_version()
    if version is None:
        return "Triton is not installed"
    if version < OLDEST:
        return f"Triton {version[0]}.{version[1]} is older than {OLDEST[0]}.{OLDEST[1]}"
    if not torch.cuda.is_available():
        return "PyTorch sees no GPU"
    if not torch.version.hip and torch.cuda.get_device_capability(index) < (8, 0):
        return f"{architecture(index)} is older than sm_80"
    if switch == "1" or _is_proved(index):
        return None
    return (
        f"no run has proved the kernels on {architecture(index)} with Triton {version[0]}.{version[1]} yet: "
        f"{SWITCH}=1 switches them on, and they check themselves"
    )
