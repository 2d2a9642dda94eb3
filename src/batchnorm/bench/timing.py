"""Times batch normalization on the CPU against torch's, alternating in one process; each case is first checked.

Every side allocates its own output. A ratio is the median, over rounds, of torch's time over ours in the same round, so
that the machine's other work affects both. The floor is the unavoidable memory traffic, at the bandwidth of a copy
measured in the same rounds. T is the bytes of one activation. Channels first, a channel stays in cache between its two
readings: forward 2 T, backward 3 T. Channels last: 3 T and 5 T. A residual adds 1 T and 2 T. Fractions over 1 occur
because large outputs are fresh memory, which the copy gets in small pages and ours in huge ones.
"""

from __future__ import annotations

import itertools
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .problem import LAST, Case, Problem

RESNET50 = [(64, 112), (64, 56), (256, 56), (128, 28), (512, 28), (256, 14), (1024, 14), (512, 7), (2048, 7)]
MOBILENET_V2 = [(32, 112), (96, 56), (144, 56), (24, 56), (192, 28), (384, 14), (576, 14), (960, 7), (1280, 7)]
IMAGES = [(32, c, s, s) for c, s in RESNET50 + MOBILENET_V2]
OTHERS = [(128, 100), (1024, 256), (8192, 1024), (32, 64, 1000), (2, 32, 64, 64, 64)]
DTYPES = (torch.float32, torch.bfloat16)
VARIANTS = ("BN", "BN+ReLU", "BN+add+ReLU")
MODES = ("forward", "forward+backward", "eval")
ROUNDS = 9, 400  # at least and at most, after a first one


@dataclass(frozen=True)
class Result:
    """What was measured of a case: medians."""

    case: Case
    ours_us: float
    eager_us: float
    fraction: float  # of the floor
    eager: float  # torch's time over ours
    compiled: float | None


def cases(
    shapes: Iterable[tuple[int, ...]], variants: Sequence[str] = VARIANTS, modes: Sequence[str] = MODES
) -> list[Case]:
    """Every combination, in both dtypes, and in both layouts where a shape has two."""
    return [
        Case(shape, dtype, last, variant, mode)
        for shape in shapes
        for dtype, last, variant, mode in itertools.product(
            DTYPES, (False, True) if len(shape) in LAST else (False,), variants, modes
        )
    ]


def measure(case: Case, seconds: float, with_compile: bool = False) -> Result:
    """Check the case, then time in turns a copy, ours, torch eager (and torch.compile) for about `seconds`.

    Raises:
        WrongResult: ours differs from float64 by more than rounding does.
    """
    problem = Problem(case)
    problem.check()
    detached = problem.x.detach()
    functions: dict[str, Callable[[], object]] = {
        "copy": lambda: torch.empty_like(detached).copy_(detached),
        "ours": problem.step(problem.ours),
        "eager": problem.step(problem.torchs),
    }
    if with_compile:
        torch.compiler.reset()  # otherwise it would stop recompiling after a few cases
        functions["compile"] = problem.step(torch.compile(problem.torchs, fullgraph=True))
    times = interleave(functions, ROUNDS, seconds)

    def ratio(over: str) -> float:
        return statistics.median(a / b for a, b in zip(times[over], times["ours"], strict=True))

    return Result(
        case,
        statistics.median(times["ours"]) * 1e6,
        statistics.median(times["eager"]) * 1e6,
        ratio("copy") * case.floor,
        ratio("eager"),
        ratio("compile") if with_compile else None,
    )


def by_clock(clock: Callable[[], float]) -> Callable[[Callable[[], object]], float]:
    """What times a function by the clock; what the function returns is freed outside the time."""

    def timed(function: Callable[[], object]) -> float:
        start = clock()
        result = function()
        taken = clock() - start
        del result
        return taken

    return timed


WALL = by_clock(time.perf_counter)


def interleave(
    functions: dict[str, Callable[[], object]],
    rounds: tuple[int, int],
    seconds: float = 0.0,
    timed: Callable[[Callable[[], object]], float] = WALL,
) -> dict[str, list[float]]:
    """Seconds of each function in each round, in a new order every round, because each run affects the next.

    Args:
        functions: what is timed, by name.
        rounds: at least and at most, after a first one that warms up.
        seconds: where at least that many rounds were done, none begins later than this.
        timed: calls a function and returns its seconds.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    least, most = rounds
    began = time.perf_counter()
    for done in range(most + 1):
        if done > least and time.perf_counter() - began >= seconds:
            break
        for name in random.sample(list(functions), len(functions)):
            taken = timed(functions[name])
            if done:
                times[name].append(taken)
    return times


@dataclass(frozen=True)
class Summary:
    """The geometric mean and the minimum of torch's time over ours, for all entries of a dtype, variant and mode."""

    dtype: str
    variant: str
    mode: str
    ratio: float
    slowest: float


def summarize(results: Sequence[Result]) -> list[Summary]:
    """One Summary for each dtype, variant and mode that was measured."""
    found = []
    for dtype, variant, mode in itertools.product(DTYPES, VARIANTS, MODES):
        ratios = [r.eager for r in results if (r.case.dtype, r.case.variant, r.case.mode) == (dtype, variant, mode)]
        if ratios:
            found.append(Summary(str(dtype)[6:], variant, mode, statistics.geometric_mean(ratios), min(ratios)))
    return found


def machine() -> dict[str, str | int]:
    """What figures depend on: processor, cores, instruction set, threads and versions."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "cores": len(names) or torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
