"""What is computed on two machines: cases, as driver.cpp reads them, and what the operators make of them.

`python problems.py inputs` writes the cases to the standard output, `results` what the operators compute.
"""

from __future__ import annotations

import itertools
import math
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

TYPES = ("float32", "float64", "bfloat16", "float16")
ACTIVATIONS = 11
NONE, RELU, RELU6, SILU = 0, 1, 2, 5
EPS, SLOPE = 1e-5, 0.3


class Layout(NamedTuple):
    """A shape (batch, channels, space) in memory, with so many values unused after each row."""

    batch: int
    channels: int
    space: int
    last: bool = False
    gap: int = 0


LAYOUTS = {
    "long planes": Layout(6, 9, 693),
    "planes in chunks": Layout(2, 2, 9001),
    "short planes": Layout(40, 20, 49),
    "planes apart": Layout(5, 8, 37, gap=3),
    "tiny planes": Layout(7, 9, 5, gap=1),
    "few channels last": Layout(6, 9, 693, last=True),
    "channels last": Layout(9, 300, 16, last=True),
    "channels last, apart": Layout(8, 37, 30, last=True, gap=5),
    "joined rows": Layout(2003, 9, 1),
    "rows": Layout(300, 201, 1),
    "short rows": Layout(5, 9, 1, gap=2),
}
SMALL = Layout(8, 9, 85)
LARGE = {"large planes": Layout(16, 9, 15201), "large rows": Layout(2201, 1000, 1)}  # their outputs pass by the caches


@dataclass(frozen=True)
class Case:
    """One call of every operator. `from_y`: backward is given y."""

    name: str
    type: str
    layout: Layout
    activation: int
    residual: bool = False
    mask: bool = False
    from_y: bool = False

    @property
    def bits(self) -> np.dtype:
        return np.dtype({"float32": np.uint32, "float64": np.uint64}.get(self.type, np.uint16))

    @property
    def rows(self) -> bool:
        return self.layout.last or self.layout.space == 1

    def size(self, gap: int) -> int:
        n, c, s, _, _ = self.layout
        return n * s * (c + gap) if self.rows else n * c * (s + gap)

    def results(self) -> list[tuple[str, np.dtype, int]]:
        """Names, integer types and lengths of what is computed, in order."""
        c, values = self.layout.channels, self.size(0)
        double = np.dtype(np.uint64)
        gradients = [(n, self.bits, values) for n in ("dx", "dresidual")[: 1 + self.residual]]
        return [
            *[("forward's y", self.bits, values), ("statistics", double, 2 * c), ("measured", double, 2 * c)],
            *[("normalize's y", self.bits, values), ("reduced", double, 2 * c), *(3 * gradients)],
        ]


def cases() -> list[Case]:
    found = []
    for (name, layout), type in itertools.product(LAYOUTS.items(), TYPES):
        found += [Case(name, type, layout, activation) for activation in (NONE, RELU, RELU6)]
        found.append(Case(name, type, layout, RELU, residual=True, from_y=True))
        found.append(Case(name, type, layout, NONE, residual=True))
        found.append(Case(name, type, layout, RELU, mask=True))
        found.append(Case(name, type, layout, SILU, residual=True, mask=True))
    for activation, type, mask in itertools.product(range(ACTIVATIONS), TYPES, (False, True)):
        found.append(Case("activations", type, SMALL, activation, mask=mask))
        found.append(Case("activations", type, SMALL, activation, residual=True, mask=mask, from_y=True))
    found += [Case(name, "float32", layout, RELU) for name, layout in LARGE.items()]
    return found


def rounded(values: np.ndarray, type: str) -> np.ndarray:
    """As bits. (Cut off for bfloat16, but for a NaN or infinity.)"""
    if type == "bfloat16":
        return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    with np.errstate(over="ignore"):
        return values.astype(type).view(f"u{np.dtype(type).itemsize}")


def inputs(case: Case, seed: int) -> tuple[np.ndarray, ...]:
    """weight, bias, mask (or nothing), x, dy, residual (or nothing), as they lie in memory."""
    random = np.random.default_rng(seed)
    n, c, s, _, gap = case.layout
    shape = (n * s, c + gap) if case.rows else (n, c, s + gap)

    def drawn(scale: float, special: bool) -> np.ndarray:
        values = random.standard_normal(shape) * scale + 1
        if special and c > 8:
            by_channel = np.moveaxis(values, 1, 0)
            by_channel[1] += 1e4 if case.type == "float16" else 1e6
            by_channel[2] *= {"float16": 1e-7, "float64": 1e-310}.get(case.type, 1e-39)  # subnormal numbers
            by_channel[3].flat[::7] = math.nan
            by_channel[4].flat[::5] = -math.inf
            by_channel[5].flat[::2] = -0.0
            by_channel[6] = 3
            by_channel[7] *= {"float16": 3e4, "float64": 1e200}.get(case.type, 1e30)  # overflows, squared at the latest
        return rounded(values, case.type).ravel()

    weight, bias = random.standard_normal((2, c)).astype(np.float32).astype(np.float64)
    mask = random.random(n * s) < 0.6 if case.mask else np.zeros(0, bool)
    residual = drawn(1, special=False) if case.residual else np.zeros(0, case.bits)
    return weight, bias, mask, drawn(2, special=True), drawn(1, special=False), residual


def encoded(case: Case, seed: int) -> bytes:
    n, c, s, last, gap = case.layout
    offset = seed % 3  # values after a line of the cache
    options = case.activation, case.residual, case.mask, case.from_y
    header = struct.pack("=11q2d", TYPES.index(case.type), n, c, s, last, gap, offset, *options, SLOPE, EPS)
    return header + b"".join(a.tobytes() for a in inputs(case, seed))


def computed(case: Case, seed: int) -> Iterator[bytes]:
    """What driver.cpp writes, by torch's operators."""
    import torch

    from batchnorm import batch_norm  # noqa: F401, loads the operators

    dtype = getattr(torch, case.type)
    n, c, s, _, gap = case.layout

    def tensor(bits: np.ndarray) -> torch.Tensor | None:
        if not bits.size:
            return None
        strides = (s * (c + gap), 1, c + gap) if case.rows else (c * (s + gap), s + gap, 1)
        flat = torch.from_numpy(bits.view(bits.dtype.name.removeprefix("u"))).view(dtype)
        # A fourth dimension, for torch to see what is channels last.
        return flat.as_strided((n, c, s, 1), (*strides, strides[2])) if s > 1 else flat.as_strided((n, c), strides[:2])

    def raw(values: torch.Tensor) -> bytes:
        in_memory = values.movedim(1, -1) if case.rows and values.dim() == 4 else values
        return in_memory.contiguous().view(torch.uint8).numpy().tobytes()

    weight, bias, mask, x, dy, residual = inputs(case, seed)
    given: dict[str, object] = {
        "mask": torch.from_numpy(mask).view((n, s, 1) if s > 1 else (n,)) if case.mask else None,
        "virtual_batch": 0,
        "need_dx": True,
        "need_dresidual": case.residual,
    }
    given |= {"x": tensor(x), "dy": tensor(dy), "residual": tensor(residual), "y": None}
    given |= {"act": case.activation, "slope": SLOPE, "eps": EPS}
    for name, values in (("weight", weight), ("bias", bias)):
        given[name] = torch.from_numpy(values).to(torch.promote_types(dtype, torch.float32))

    def call(name: str, **more: object):
        operator = getattr(torch.ops.batchnorm, name).default
        known = {**given, **more}
        return operator(**{a.name: known[a.name] for a in operator._schema.arguments})

    y, statistics = call("forward")
    yield raw(y)
    yield raw(statistics[1:3])
    yield raw(call("measure")[1:3])
    yield raw(call("normalize", statistics=statistics))
    given |= {"statistics": statistics, "y": y if case.from_y else None}
    sums = call("reduce")
    yield raw(sums)
    yield from map(raw, call("apply", sums=sums)[: 1 + case.residual])
    for measured in (True, False):
        yield from map(raw, call("backward", measured=measured)[: 1 + case.residual])


if __name__ == "__main__":
    make = {"inputs": lambda *of: [encoded(*of)], "results": computed}[sys.argv[1]]
    for seed, case in enumerate(cases()):
        for part in make(case, seed):
            sys.stdout.buffer.write(part)
