"""Every operator once: its signature, its tags, and what it returns in a trace. C++ and Triton only implement.

Statistics are one float64 tensor with the rows count, mean and m2 of every channel: (3, C), or (3, G, C) of G virtual
batches. With eps they give 1 / sqrt(m2 / max(count, 1) + eps), by which x - mean is scaled. A running variance stands
in the row of m2 beside a count of 0. An output that was not asked for is None.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from .plain import virtual_batches

STATISTICS, SUMS = 3, 2  # rows
# Dtypes of the input that our kernels support.
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# The operators take any strides, so that Inductor need not copy from NCHW to NHWC and back around each of them. The
# oldest supported torch lacks this tag: there the copies remain, and nothing else changes.
_TAGS = (torch.Tag.pt2_compliant_tag, *([torch.Tag.flexible_layout] if hasattr(torch.Tag, "flexible_layout") else []))

library = torch.library.Library("batchnorm", "DEF")


def _operator(signature: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Define batchnorm::`signature` with the decorated function as its fake."""
    name = signature.partition("(")[0]

    def define(fake: Callable[..., Any]) -> Callable[..., Any]:
        def checked(*args: Any, **kwargs: Any) -> Any:
            _check_no_values_are_asked_for(name, args)
            return fake(*args, **kwargs)

        library.define(signature, tags=_TAGS)
        torch.library.register_fake(f"batchnorm::{name}", checked, lib=library)
        return fake

    return define


@_operator(
    "forward(Tensor x, Tensor? weight, Tensor? bias, float eps, int act=0, float slope=0., "
    "Tensor? residual=None, Tensor? mask=None, int virtual_batch=0) -> (Tensor y, Tensor statistics)"
)
def forward(
    x: Tensor, weight: Any, bias: Any, eps: float, act: int = 0, slope: float = 0.0, residual: Any = None,
    mask: Any = None, virtual_batch: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Measure x and normalize it: y = act((x - mean) * rstd * weight + bias + residual), 0 where the mask is False."""
    return _like(x), _rows(x, STATISTICS, virtual_batch)


@_operator(
    "forward_(Tensor x, Tensor? weight, Tensor? bias, float eps, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
    "Tensor(c!)? batches, float momentum, int act=0, float slope=0., Tensor? residual=None, Tensor? mask=None, "
    "bool unbiased=True, bool skip_nonfinite=False) -> (Tensor y, Tensor statistics)"
)
def forward_(x: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    """`forward`, the running statistics moved as by `update_running_`, and `batches` counted: a whole training call."""
    return _like(x), _rows(x, STATISTICS)


@_operator(
    "infer(Tensor x, Tensor running_mean, Tensor running_var, Tensor? weight, Tensor? bias, float eps, "
    "int act=0, float slope=0., Tensor? residual=None, Tensor? mask=None, bool keep=False) "
    "-> (Tensor y, Tensor statistics)"
)
def infer(
    x: Tensor, running_mean: Tensor, running_var: Tensor, weight: Any, bias: Any, eps: float, act: int = 0,
    slope: float = 0.0, residual: Any = None, mask: Any = None, keep: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """y by the running statistics; `keep`: also return a copy of them, as statistics."""
    return _like(x), _rows(x, STATISTICS) if keep else None


@_operator("measure(Tensor x, Tensor? mask=None, int virtual_batch=0) -> Tensor statistics")
def measure(x: Tensor, mask: Any = None, virtual_batch: int = 0) -> Tensor:
    """The statistics of x."""
    return _rows(x, STATISTICS, virtual_batch)


@_operator(
    "normalize(Tensor x, Tensor statistics, Tensor? weight, Tensor? bias, float eps, int act=0, "
    "float slope=0., Tensor? residual=None, Tensor? mask=None, int virtual_batch=0) -> Tensor"
)
def normalize(x: Tensor, *_: Any, **__: Any) -> Tensor:
    """y by statistics that were measured before."""
    return _like(x)


@_operator(
    "reduce(Tensor dy, Tensor x, Tensor statistics, Tensor? weight, Tensor? bias, float eps, int act=0, "
    "float slope=0., Tensor? residual=None, Tensor? y=None, Tensor? mask=None, int virtual_batch=0) -> Tensor sums"
)
def reduce(
    dy: Tensor, x: Tensor, statistics: Tensor, weight: Any, bias: Any, eps: float, act: int = 0, slope: float = 0.0,
    residual: Any = None, y: Any = None, mask: Any = None, virtual_batch: int = 0,
) -> Tensor:  # fmt: skip
    """sum(dz) and sum(dz * xhat) of every channel, where dz = dy * act'(z): (2, C) or (2, G, C)."""
    return _rows(x, SUMS, virtual_batch)


@_operator(
    "apply(Tensor dy, Tensor x, Tensor statistics, Tensor? sums, Tensor? weight, Tensor? bias, float eps, "
    "int act=0, float slope=0., Tensor? residual=None, Tensor? y=None, Tensor? mask=None, int virtual_batch=0, "
    "bool need_dx=True, bool need_dresidual=False) -> (Tensor dx, Tensor dresidual)"
)
def apply(
    dy: Tensor, x: Tensor, statistics: Tensor, sums: Any, weight: Any, bias: Any, eps: float, act: int = 0,
    slope: float = 0.0, residual: Any = None, y: Any = None, mask: Any = None, virtual_batch: int = 0,
    need_dx: bool = True, need_dresidual: bool = False,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """dx and the residual's gradient, from those sums; without sums the statistics get no gradient."""
    return _like(x) if need_dx else None, _like(x) if need_dresidual else None


@_operator(
    "backward(Tensor dy, Tensor x, Tensor statistics, Tensor? weight, Tensor? bias, float eps, int act=0, "
    "float slope=0., Tensor? residual=None, Tensor? y=None, Tensor? mask=None, int virtual_batch=0, "
    "bool measured=True, bool need_dx=True, bool need_dresidual=False) "
    "-> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)"
)
def backward(
    dy: Tensor, x: Tensor, statistics: Tensor, weight: Any, bias: Any, eps: float, act: int = 0, slope: float = 0.0,
    residual: Any = None, y: Any = None, mask: Any = None, virtual_batch: int = 0, measured: bool = True,
    need_dx: bool = True, need_dresidual: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """`reduce` and `apply` in one; `measured`: the statistics are x's own, and gradients flow through them."""
    return (
        _like(x) if need_dx else None,
        _like(x) if need_dresidual else None,
        None if weight is None else weight.new_empty((x.size(1),)),
        None if bias is None else bias.new_empty((x.size(1),)),
    )


@_operator(
    "update_running_(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor statistics, float momentum, "
    "bool unbiased=True, bool skip_nonfinite=False) -> ()"
)
def update_running_(*_: Any, **__: Any) -> None:
    """running = (1 - momentum) * running + momentum * measured; see `plain.track`."""


library.define("vector_bytes() -> int")  # of the registers that the CPU's loops use


def _check_no_values_are_asked_for(name: str, args: tuple[Any, ...]) -> None:
    """A tensor without values among real ones would give a result of uninitialized memory."""
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    real = [tensor.device for tensor in tensors if type(tensor) in (Tensor, torch.nn.Parameter) and not tensor.is_meta]
    if real:
        raise RuntimeError(
            f"batchnorm::{name} expects all tensors on one device, but got one without values (meta, or fake) among "
            f"those on {real[0]}; move the model and its input to one device"
        )


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=suggest_memory_format(x))


def _rows(x: Tensor, rows: int, virtual_batch: int = 0) -> Tensor:
    groups = (virtual_batches(x, virtual_batch),) if virtual_batch else ()
    return x.new_empty((rows, *groups, x.size(1)), dtype=torch.float64)
