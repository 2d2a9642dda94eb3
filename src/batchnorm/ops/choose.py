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

_TRANSFORMED = "a transform of torch.func, forward mode or torch.jit.trace is at work"
_OURS = "there is a kernel of ours"
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
    return why_not_native(operands, settings, training) is None


def native_at_once(x: object) -> bool:
    """Whether torch's own operators serve x, and compute when they are called: nobody traces or transforms."""
    return (
        type(x) is Tensor
        and not (x.is_cpu and cpu.COMPILED)
        and x.layout is torch.strided
        and not torch.compiler.is_dynamo_compiling()
        and _get_tracing_state() is None
        and not under_transform()
    )


def why_not_native(operands: Operands, settings: Settings, training: bool) -> str | None:
    """Why torch's own batch-norm operator is not the call; None if it is."""
    if under_transform() or _get_tracing_state() is not None:
        return _TRANSFORMED
    if why_not_cpu(operands.x) is None:
        return _OURS
    return native.why_not(operands, settings, training)


def serves_native_over_ranks(operands: Operands) -> bool:
    """Whether a training call over ranks is torch's own operators for that; it may be of an empty batch."""
    return why_not_native_over_ranks(operands) is None


def why_not_native_over_ranks(operands: Operands) -> str | None:
    """Why torch's own operators do not measure over ranks; None if they do."""
    if composes(operands.x):
        return _TRANSFORMED
    if why_not_cpu(operands.x) is None:
        return _OURS
    if operands.mask is not None:
        return "torch's batch norm has no mask"
    if not native_sync.serves(operands.x):
        return f"torch has no operators on {operands.x.device.type} that measure over ranks"
    return None


class Backend(NamedTuple):
    """One implementation: what it serves, whether this machine has it, and of a call, whether it serves that."""

    name: str
    serves: str
    dtypes: tuple[torch.dtype, ...] | None  # None: those that torch's own batch norm takes
    register_bits: int | None
    on: bool
    why_not: str  # if it is not on, or does not serve the call


def backends(
    operands: Operands | None, settings: Settings, training: bool, renormalized: bool = False, over_ranks: bool = False
) -> list[Backend]:
    """The implementations, and why each serves the call or not; without a call whether the machine has them."""
    cpu_off = "" if cpu.COMPILED else "batchnorm was installed without a C++ compiler: install one, and it again"
    bits = 8 * torch.ops.batchnorm.vector_bytes() if cpu.COMPILED else None
    reasons = ["", "", ""] if operands is None else _reasons(operands, settings, training, renormalized, over_ranks)
    return [
        Backend("cpu", "the CPU, every option", cpu.DTYPES, bits, cpu.COMPILED, cpu_off or reasons[0]),
        Backend("native", "other devices, the options that torch.nn has", None, None, True, reasons[1]),
        Backend("plain", "everything else: any option anywhere, torch.func", None, None, True, reasons[2]),
    ]


def _reasons(
    operands: Operands, settings: Settings, training: bool, renormalized: bool, over_ranks: bool
) -> tuple[str, str, str]:
    """Why cpu, native and plain do not serve the call; empty of the one that does."""
    x = operands.x
    cpu_off = why_not_cpu(x) or (_TRANSFORMED if composes(x) else None)
    if cpu_off is None:
        native_off = _OURS
    elif training and renormalized:
        native_off = "torch's batch norm has no renormalization"
    elif training and over_ranks:
        native_off = why_not_native_over_ranks(operands)
    else:
        native_off = why_not_native(operands, settings, training)
    served = "cpu serves it" if cpu_off is None else "native serves it" if native_off is None else ""
    return cpu_off or "", native_off or "", served
