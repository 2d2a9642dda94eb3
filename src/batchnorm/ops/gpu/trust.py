"""Kernels check themselves on machines where no committed run has proved them.

A kernel is compiled for each `variant` of a call: its dtypes, layout, activation and operands. The first call of a
variant computes a few of its channels on plain operators, too, and compares. That waits for the device once. While a
CUDA graph is captured nothing can wait, so plain operators serve. Values that are not finite cannot be compared: after
such a call, the next call of the variant is checked too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import available
from .cut import cut
from .layout import outline

Operator = Callable[[str, dict[str, Any]], Any]
_MOVED = ("running_mean", "running_var", "batches")
_COMPARED = 4  # channels
# Tolerance relative to the largest value: some units in the last place; float32 has 24 bits.
_TOLERANCE = {torch.float64: 2.0**-40, torch.float32: 2.0**-16, torch.float16: 2.0**-9, torch.bfloat16: 2.0**-6}
# relu, relu6, leaky_relu, elu, hardswish: where z is a rounding error from a kink, two right answers may differ by dy.
_KINKED, _AT_KINKS, _SUMMED_AT_KINKS = (1, 2, 3, 4, 8), 1e-5, 64
_trusted: set[tuple[Any, ...]] = set()


def call(name: str, given: dict[str, Any], by_kernels: Operator, by_plain: Operator) -> Any:
    """The operator by kernels if this variant is trusted, or turns out right; else by plain operators."""
    key = variant(name, given)
    if key in _trusted:
        return by_kernels(name, given)
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return by_plain(name, given)
    before = {part: given[part].clone() for part in _MOVED if given.get(part) is not None}
    try:
        result = by_kernels(name, dict(given))
        wrong, all_compared = _difference(name, given, _flat(result), before, by_plain)
    except torch.OutOfMemoryError:
        _restore(given, before)  # the caller may free memory and call again
        raise
    except Exception as error:  # the compiler's and the driver's are of many types
        wrong = f"{name} raised {type(error).__name__}: {error}"
    else:
        if wrong is None:
            if all_compared:
                _trusted.add(key)
            return result
    available.distrust(wrong)
    _restore(given, before)
    return by_plain(name, given)


def _restore(given: dict[str, Any], before: dict[str, Tensor]) -> None:
    for part, value in before.items():
        given[part].copy_(value)


def variant(name: str, given: dict[str, Any]) -> tuple[Any, ...]:
    """The properties of a call that its kernels are compiled for."""
    operands = tuple(
        value.dtype if isinstance(value, Tensor) else value
        for key, value in given.items()
        if key not in ("slope", "eps", "momentum")
    )
    if "x" not in given:
        return name, operands
    view = outline(given["x"])
    cuts = [cut(view, sums, given.get("mask") is not None) for sums in (True, False)]
    shapes = [(c.block_rows, c.block_columns, c.align, view.planes, view.inner == 1) for c in cuts]
    return name, given["x"].device.index, operands, *shapes


def _difference(
    name: str, given: dict[str, Any], results: list[Any], before: dict[str, Tensor], by_plain: Operator
) -> tuple[str | None, bool]:
    """How the results, and what has moved, differ from what plain operators make of some channels; None: not at all.

    And whether all values of these channels were finite, and so were compared.
    """
    channels = _channels(given)
    found = [_of(each, channels, given) for each in [*results, *(given[part] for part in before)]]
    few = {key: _of(before.get(key, value), channels, given) for key, value in given.items()}
    expected = [*_flat(by_plain(name, few)), *(few[part] for part in before)]
    scales, all_compared = _Scales(few), True
    for number, (is_, should) in enumerate(zip(found, expected, strict=True)):
        if is_ is None or should is None:
            continue
        finite = should.isfinite()
        all_compared = all_compared and bool(finite.all())
        off, should = torch.where(finite, (is_.double() - should.double()).abs(), 0.0), torch.where(finite, should, 0)
        flips = _AT_KINKS * off.numel() + 2 if scales.kinked and scales.is_by_value(should) else 0
        if not bool(off.isfinite().all()) or int((off > scales.slack(should)).sum()) > flips:
            size = float(should.abs().max())
            return f"result {number} of {name}, {is_.dtype}, is {float(off.max()):g} off values up to {size:g}", False
    return None, all_compared


class _Scales:
    """How far two right answers may be apart: by rounding, which is relative to what is added up."""

    def __init__(self, few: dict[str, Any]) -> None:
        self.x, dy = few.get("x"), few.get("dy")
        self.kinked = dy is not None and few["act"] in _KINKED
        self.terms = 0.0 if self.x is None else _largest(self.x, few)
        self.count = 0 if self.x is None else self.x.numel() // max(self.x.size(1), 1)
        self.gradient: float | None = None
        if dy is not None:
            self.gradient = _largest(dy, few)
            count, _, m2 = few["statistics"]
            rstd = torch.rsqrt(m2 / count.clamp(min=1) + few["eps"])
            weight = few["weight"]
            self.terms = self.gradient * float((rstd if weight is None else rstd * weight).abs().max())

    def is_by_value(self, result: Tensor) -> bool:
        return self.x is not None and result.shape == self.x.shape

    def slack(self, result: Tensor) -> float:
        size = float(result.abs().max())
        if self.is_by_value(result) or self.gradient is None:
            return _TOLERANCE[self._dtype(result)] * (size + self.terms)
        # Sums of dz and dz * xhat: terms up to some times dy, of which a few may stand at a kink.
        at_kinks = _SUMMED_AT_KINKS if self.kinked else 0
        return self.gradient * (at_kinks + _TOLERANCE[self._dtype(result)] * self.count) + (
            _TOLERANCE[result.dtype] * size
        )

    def _dtype(self, result: Tensor) -> torch.dtype:
        """In which it was computed: its own, but float64 is of sums in x's."""
        if not result.is_floating_point() or self.x is None:
            return torch.float64
        return torch.float32 if result.dtype == torch.float64 and self.x.dtype != torch.float64 else result.dtype


def _largest(tensor: Tensor, few: dict[str, Any]) -> float:
    """The largest finite magnitude, without what the mask leaves out, which may be anything."""
    counted, mask = tensor.isfinite(), few.get("mask")
    if mask is not None:
        counted = counted & mask.unsqueeze(1)
    return float(torch.where(counted, tensor, 0).abs().max())


def _channels(given: dict[str, Any]) -> list[int]:
    count = _count(given)
    return sorted({(count - 1) * i // (_COMPARED - 1) for i in range(_COMPARED)})


def _count(given: dict[str, Any]) -> int:
    return given["x"].size(1) if "x" in given else given["running_mean"].numel()


def _of(value: Any, channels: list[int], given: dict[str, Any]) -> Any:
    """Those channels of x and what is like it, of vectors, and of rows; all of the rest."""
    if not isinstance(value, Tensor):
        return value
    x = given.get("x")
    if x is not None and value.shape == x.shape:
        return value[:, channels]
    of_channels = value.dim() in (1, 2) and value.size(-1) == _count(given) and value.dtype != torch.bool
    return value[..., channels].clone() if of_channels else value.clone()


def _flat(result: Any) -> list[Any]:
    return list(result) if isinstance(result, tuple) else [] if result is None else [result]
