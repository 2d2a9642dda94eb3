"""Which implementation serves a call, and why the others do not: decided in this one place.

cpu      C++ for tensors in the CPU's memory
gpu      Triton kernels, where a committed run has proved them or BATCHNORM_GPU=1 switches them on
native   torch's own batch-norm operators, where there is no kernel of ours
plain    torch's elementwise operators and sums: everything else, on any device
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import cpu, gpu, kernels, native, native_sync, plain
from .native import is_wrapped
from .plain import Operands, Settings
from .schema import DTYPES

_TRANSFORMED = "a transform of torch.func, forward mode or torch.jit.trace is active"
_OURS = "there is a kernel of ours"
_NAMES = ("cpu", "gpu", "native")
_FIRST = torch.device("cuda", 0)
_get_tracing_state = torch._C._get_tracing_state
_transforms_active = torch._C._are_functorch_transforms_active


def under_transform() -> bool:
    """Whether forward mode or a transform of torch.func is active, eager or compiled.

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
    if x.dtype not in DTYPES:
        return f"the input's dtype is {x.dtype}"
    return f"{type(x).__name__} handles torch's operators itself" if is_wrapped(x) else None


def why_not_gpu(x: Tensor, virtual_batch: int = 0) -> str | None:
    """Why the Triton kernels do not serve x; None if they do."""
    if not x.is_cuda:
        return f"the input is on {x.device}"
    off = gpu.why_not(x.device)
    if off is not None:
        return off
    if x.layout is not torch.strided:
        return f"the input's layout is {x.layout}"
    if x.dtype not in DTYPES:
        return f"the input's dtype is {x.dtype}"
    if virtual_batch:
        return "the kernels have no virtual batches"
    return f"{type(x).__name__} handles torch's operators itself" if is_wrapped(x) else None


def _have_kernels(x: Tensor, virtual_batch: int = 0) -> bool:
    return why_not_cpu(x) is None or why_not_gpu(x, virtual_batch) is None


def composes(x: Tensor) -> bool:
    """Whether plain operators serve without a Function around them, so that an active transform sees each of them.

    torch.jit.trace counts as one, because it cannot save a Function.
    """
    return under_transform() or is_wrapped(x) or _get_tracing_state() is not None


def steps(x: Tensor, virtual_batch: int = 0) -> ModuleType:
    """The module whose measure, normalize, forward, infer, reduce, apply, backward and track serve x."""
    return kernels if _have_kernels(x, virtual_batch) and not composes(x) else plain


def gpu_serves(x: Tensor) -> bool:
    """Whether x, a plain Tensor that is not on the CPU, is on a device with operators of ours."""
    return x.is_cuda and gpu.why_not(x.device) is None


def serves_native(operands: Operands, settings: Settings, training: bool) -> bool:
    """Whether the call is torch's own batch-norm operator."""
    return why_not_native(operands, settings, training) is None


def native_at_once(x: object) -> bool:
    """Whether torch's own operators serve x, and compute when they are called: nobody traces or transforms."""
    return (
        type(x) is Tensor
        and not (cpu.COMPILED if x.is_cpu else gpu_serves(x))
        and x.layout is torch.strided
        and not torch.compiler.is_dynamo_compiling()
        and _get_tracing_state() is None
        and not under_transform()
    )


def why_not_native(operands: Operands, settings: Settings, training: bool) -> str | None:
    """Why torch's own batch-norm operator is not the call; None if it is."""
    if under_transform() or _get_tracing_state() is not None:
        return _TRANSFORMED
    if _have_kernels(operands.x, settings.virtual_batch if training else 0):
        return _OURS
    return native.why_not(operands, settings, training)


def serves_native_over_ranks(operands: Operands) -> bool:
    """Whether a training call over ranks is torch's own operators for that; it may be of an empty batch."""
    return why_not_native_over_ranks(operands) is None


def why_not_native_over_ranks(operands: Operands) -> str | None:
    """Why torch's own operators do not measure over ranks; None if they do."""
    if composes(operands.x):
        return _TRANSFORMED
    if why_not_cpu(operands.x) is None or (operands.x.is_cuda and gpu.why_off(operands.x.device) is None):
        return _OURS  # for a GPU even if a kernel was found to be wrong, because ranks have to agree on what they send
    if operands.mask is not None:
        return "torch's batch norm has no mask"
    if not native_sync.serves(operands.x):
        return f"torch has no operators on {operands.x.device.type} that measure over ranks"
    return None


class Backend(NamedTuple):
    """One implementation: what it serves, whether this machine has it, and whether it serves the given call."""

    name: str
    serves: str
    dtypes: tuple[torch.dtype, ...] | None  # None: those that torch's own batch norm takes
    register_bits: int | None
    on: bool
    why_not: str  # if it is not on, or does not serve the call


def backends(
    operands: Operands | None, settings: Settings, training: bool, renormalized: bool = False, over_ranks: bool = False
) -> list[Backend]:
    """The implementations, each with the reason why it does not serve the call, or, without a call, this machine."""
    cpu_off = "" if cpu.COMPILED else f"batchnorm was installed without its compiled operators: {cpu.CURE}"
    gpu_off = gpu.why_not(operands.x.device if operands is not None and operands.x.is_cuda else _FIRST)
    bits = 8 * torch.ops.batchnorm.vector_bytes() if cpu.COMPILED else None
    if operands is None:
        reasons = ("", gpu_off or "", "", "")
    else:
        reasons = _reasons(operands, settings, training, renormalized, over_ranks)
    return [
        Backend("cpu", "the CPU, every option", DTYPES, bits, cpu.COMPILED, cpu_off or reasons[0]),
        Backend("gpu", "NVIDIA and AMD GPUs, all but virtual batches", DTYPES, None, gpu_off is None, reasons[1]),
        Backend("native", "other devices, the options that torch.nn has", None, None, True, reasons[2]),
        Backend("plain", "everything else: any option anywhere, torch.func", None, None, True, reasons[3]),
    ]


def _reasons(
    operands: Operands, settings: Settings, training: bool, renormalized: bool, over_ranks: bool
) -> tuple[str, str, str, str]:
    """Why cpu, gpu, native and plain do not serve the call; empty for the one that does."""
    x, transformed = operands.x, _TRANSFORMED if composes(operands.x) else None
    cpu_off = why_not_cpu(x) or transformed
    gpu_off = why_not_gpu(x, settings.virtual_batch if training else 0) or transformed
    if cpu_off is None or gpu_off is None:
        native_off = _OURS
    elif training and renormalized:
        native_off = "torch's batch norm has no renormalization"
    elif training and over_ranks:
        native_off = why_not_native_over_ranks(operands)
    else:
        native_off = why_not_native(operands, settings, training)
    offs = zip(_NAMES, (cpu_off, gpu_off, native_off), strict=True)
    serves = next((f"{name} serves it" for name, off in offs if off is None), "")
    return cpu_off or "", gpu_off or "", native_off or "", serves
