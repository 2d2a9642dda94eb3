"""Times batch normalization on the CPU beside torch's, interleaved in one process: ratios and fractions of a floor.

    python benchmarks/cpu.py [--quick] [--compile] [--seconds 1.0]

prints a table and writes it to benchmarks/results/cpu.md. --quick takes a few minutes, the whole list much longer.

Every side allocates its own output. A ratio is the median, over rounds, of torch's time over ours in the same round,
so that what else the machine does weighs on both. The floor is the memory traffic that the operation cannot do
without, at the bandwidth of a copy measured in the same rounds: where a channel stays in cache between its two readings
(channels first), forward 2 T and backward 3 T, with T the bytes of one activation; channels last 3 T and 5 T; a
residual adds 1 T and 2 T.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from common import header, save
from torch import Tensor

import batchnorm as bn

RESNET50 = [(64, 112), (64, 56), (256, 56), (128, 28), (512, 28), (256, 14), (1024, 14), (512, 7), (2048, 7)]
MOBILENET_V2 = [(32, 112), (96, 56), (144, 56), (24, 56), (192, 28), (384, 14), (576, 14), (960, 7), (1280, 7)]
IMAGES = [(32, c, s, s) for c, s in RESNET50 + MOBILENET_V2]
OTHERS = [(128, 100), (1024, 256), (8192, 1024), (32, 64, 1000), (2, 32, 64, 64, 64)]
QUICK = [
    (32, 64, 56, 56),
    (32, 512, 14, 14),
    (32, 512, 7, 7),
    (32, 96, 28, 28),
    (128, 100),
    (1024, 256),
    (32, 64, 1000),
]
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
VARIANTS = ("BN", "BN+ReLU", "BN+add+ReLU")
MODES = ("forward", "forward+backward", "eval")
LARGE = 8 << 20


@dataclass(frozen=True)
class Case:
    shape: tuple[int, ...]
    dtype: torch.dtype
    last: bool
    variant: str
    mode: str

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def floor(self) -> float:
        """Traffic that cannot be avoided, in copies (2 T each)."""
        resident = not self.last and len(self.shape) > 2
        residual = self.variant == "BN+add+ReLU"
        if self.mode == "eval":
            return (2 + residual) / 2
        forward = (2 if resident else 3) + residual
        backward = (3 if resident else 5) + 2 * residual
        return (forward + (backward if self.mode == "forward+backward" else 0)) / 2


@dataclass(frozen=True)
class Result:
    case: Case
    ours_us: float
    fraction: float  # of the floor
    eager: float  # torch's time over ours
    compiled: float | None


def sides(case: Case, with_compile: bool) -> dict[str, Callable[[], object]]:
    """What is timed: a copy, ours, torch eager, and torch.compile if asked for."""
    make = torch.randn(case.shape).to(case.dtype)
    x = make.contiguous(memory_format=LAST[len(case.shape)]) if case.last else make
    channels = case.shape[1]
    training = case.mode != "eval"
    backward = case.mode == "forward+backward"
    residual = torch.randn_like(x).requires_grad_(backward) if case.variant == "BN+add+ReLU" else None
    weight, bias = torch.rand(channels).requires_grad_(backward), torch.randn(channels).requires_grad_(backward)
    mean, var = torch.zeros(channels), torch.ones(channels)
    dy = torch.randn_like(x)
    leaf = x.detach().requires_grad_(backward)

    def torchs(x: Tensor, residual: Tensor | None) -> Tensor:
        y = F.batch_norm(x, mean, var, weight, bias, training)
        if residual is not None:
            y = y + residual
        return y if case.variant == "BN" else F.relu(y)

    def ours(x: Tensor, residual: Tensor | None) -> Tensor:
        activation = None if case.variant == "BN" else "relu"
        return bn.batch_norm(x, mean, var, weight, bias, training, residual=residual, activation=activation)

    inputs = [t for t in (leaf, weight, bias, residual) if t is not None]

    def step(function: Callable[[Tensor, Tensor | None], Tensor]) -> Callable[[], object]:
        if backward:
            return lambda: torch.autograd.grad(function(leaf, residual), inputs, dy)
        return lambda: function(leaf, residual)

    found = {"copy": lambda: torch.empty_like(x).copy_(x), "ours": step(ours), "eager": step(torchs)}
    if with_compile:
        found["compile"] = step(torch.compile(torchs))
    return found


def measure(case: Case, seconds: float, with_compile: bool) -> Result:
    """Interleave the sides for about `seconds`, at least 5 rounds."""
    functions = sides(case, with_compile)
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    began = time.perf_counter()
    while len(times["copy"]) < 5 or (time.perf_counter() - began < seconds and len(times["copy"]) < 400):
        for name, function in functions.items():
            start = time.perf_counter()
            result = function()
            times[name].append(time.perf_counter() - start)
            del result  # outside the time, for every side

    def ratio(over: str) -> float:
        return statistics.median(a / b for a, b in zip(times[over], times["ours"], strict=True))

    return Result(
        case,
        statistics.median(times["ours"]) * 1e6,
        ratio("copy") * case.floor,
        ratio("eager"),
        ratio("compile") if with_compile else None,
    )


def geometric_mean(values: list[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values)))


def cases(quick: bool) -> list[Case]:
    found = []
    for shape in QUICK if quick else IMAGES + OTHERS:
        layouts = (False, True) if len(shape) in LAST else (False,)
        dtypes = (torch.float32, torch.bfloat16)
        for dtype, last, variant, mode in itertools.product(dtypes, layouts, VARIANTS, MODES):
            found.append(Case(shape, dtype, last, variant, mode))
    return found


def row(result: Result) -> str:
    case = result.case
    compiled = "" if result.compiled is None else f"{result.compiled:.2f}"
    return (
        f"| {'x'.join(map(str, case.shape))} | {str(case.dtype)[6:]} | {'last' if case.last else 'first'} "
        f"| {case.variant} | {case.mode} | {result.ours_us:,.0f} | {result.fraction:.0%} "
        f"| {result.eager:.2f} | {compiled} |"
    )


def summary(results: list[Result]) -> list[str]:
    lines = ["| what | geometric mean of torch eager / ours | slowest entry |", "|---|---|---|"]
    for dtype, variant, mode in itertools.product((torch.float32, torch.bfloat16), VARIANTS, MODES):
        ratios = [r.eager for r in results if (r.case.dtype, r.case.variant, r.case.mode) == (dtype, variant, mode)]
        if ratios:
            name = f"{str(dtype)[6:]}, {variant}, {mode}"
            lines.append(f"| {name} | {geometric_mean(ratios):.2f} | {min(ratios):.2f} |")
    large = [r.fraction for r in results if r.case.bytes > LARGE]
    slower = sum(r.eager < 0.95 for r in results)
    lines += [
        "",
        f"Over 8 MiB: {statistics.median(large):.0%} of the copy floor in the median, at least {min(large):.0%}."
        if large
        else "",
        f"Entries slower than torch eager (below 0.95): {slower} of {len(results)}.",
    ]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few shapes")
    parser.add_argument("--compile", action="store_true", help="time torch.compile too (compiling takes minutes)")
    parser.add_argument("--seconds", type=float, default=0.5, help="for each entry, about")
    arguments = parser.parse_args()

    columns = ["| shape | dtype | channels | what | mode | ours, µs | of the floor | eager / ours | compile / ours |"]
    columns += ["|---|---|---|---|---|---|---|---|---|"]
    print("\n".join(columns))
    results = []
    for case in cases(arguments.quick):
        results.append(measure(case, arguments.seconds, arguments.compile))
        print(row(results[-1]), flush=True)
    print("\n" + "\n".join(summary(results)))
    notes = (
        "A ratio above 1 says how many times faster this package is than torch. What the columns mean: see the program."
    )
    save("cpu", [*header("Batch normalization on the CPU", notes), *summary(results), "", *columns, *map(row, results)])


if __name__ == "__main__":
    main()
