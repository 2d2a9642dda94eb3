"""Which implementation serves a call, and why not another: the one place that asks.

cpu      C++ for tensors in the CPU's memory
native   torch's own batch-norm operators, where there is no kernel of ours
plain    torch's elementwise operators and sums: all that the others do not do, on any device
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import cpu, native, native_sync, plain
from .native import is_wrapped
from .plain import Operands, Settings

_get_tracing_state = torch._C._get_tracing_state
_transforms_active = torch._C._are_functorch_transforms_active


def under_transform() -> bool:
    """Whether forward mode or a transform of torch.func is at work, eager or compiled.

    Then plain operators compute, for they compose with any transform: an autograd.Function has one backward, which
    forward mode cannot differentiate again, and an operator of ours has no derivative of its own.
    """
    return _transforms_active() or forward_ad._current_level >= 0


def why_not_cpu(x: Tensor) -> str | None:
    """Why the C++ operators do not serve x; None if they do."""
    if not cpu.COMPILED:
        return "batchnorm was installed without its compiled operators"
    if not x.is_cpu:
        return f"the input is on {x.device}"
    if x.layout is not torch.strided:
        return f"the input's layout is {x.layout}"
    if x.dtype not in cpu.DTYPES:
        return f"the input's dtype is {x.dtype}"
    return f"{type(x).__name__} sees to torch's operators itself" if is_wrapped(x) else None


def composes(x: Tensor) -> bool:
    """Whether plain operators serve without a Function around them, so that whatever is at work sees each of them.

    torch.jit.trace is among that: a Function cannot be saved.
    """
    return under_transform() or is_wrapped(x) or _get_tracing_state() is not None


def steps(x: Tensor) -> ModuleType:
    """The module whose measure, normalize, forward, infer, reduce, apply, backward and track serve x."""
    return plain if why_not_cpu(x) or composes(x) else cpu


def serves_native(operands: Operands, settings: Settings, training: bool) -> bool:
    """Whether the call is torch's own batch-norm operator."""
    if why_not_cpu(operands.x) is None or under_transform() or _get_tracing_state() is not None:
        return False
    return native.why_not(operands, settings, training) is None


def serves_native_over_ranks(operands: Operands, settings: Settings) -> bool:
    """Whether a training call over ranks is torch's own operators for that; it may be of an empty batch."""
    if operands.mask is not None or not native_sync.serves(operands.x):
        return False
    return why_not_cpu(operands.x) is not None and not composes(operands.x)


class Backend(NamedTuple):
    """One implementation, and whether this machine has it."""

    name: str
    serves: str
    on: bool
    why_not: str | None


def backends() -> list[Backend]:
    """What this machine has to compute with; see `batchnorm.backends`."""
    cpu_off = None if cpu.COMPILED else "batchnorm was installed without a C++ compiler: install one, and it again"
    return [
        Backend("cpu", "tensors in the CPU's memory, every option", cpu.COMPILED, cpu_off),
        Backend("native", "other devices, with the options that torch.nn has", True, None),
        Backend("plain", "everything else, and torch.func, forward mode, second derivatives", True, None),
    ]
