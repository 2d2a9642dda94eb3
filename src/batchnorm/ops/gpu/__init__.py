"""Triton kernels for GPUs: off until a committed run proves them on that kind of GPU, or the environment says so.

available         why they serve a device, or not
implementation    the operators for CUDA tensors, with arguments (checked) and trust (whether kernels are right)
operators         the operators on launches; launch
layout, cut       how a tensor is walked, and by which programs
sums, maps        the kernels over a tensor's values, with values and activations
merge             the kernels over its channels

Nothing here imports Triton before a kernel is launched.
"""

from ..schema import library
from .available import why_not, why_off
from .implementation import by_kernels, register

register(library)

__all__ = ["by_kernels", "why_not", "why_off"]
