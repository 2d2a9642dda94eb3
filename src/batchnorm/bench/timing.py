"""Times batch normalization on the CPU beside torch's, in turns in one process, each case first checked for exactness.

Every side allocates its own output. A ratio is the median, over rounds, of torch's time over ours in the same round,
so that what else the machine does weighs on both. The floor is the memory traffic that the operation cannot do
without, at the bandwidth of a copy measured in the same rounds (large outputs are fresh memory, which the copy gets in
small pages and ours in huge ones: hence fractions over 1): where a channel stays in cache between its two readings
(channels first), forward 2 T and backward 3 T, with T the bytes of one activation; channels last 3 T and 5 T; a
residual adds 1 T and 2 T.
"""

from __future__ import annotations

import itertools
import math
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..activations import parse
from ..functional import batch_norm

RESNET50 = [(64, 112), (64, 56), (256, 56), (128, 28), (512, 28), (256, 14), (1024, 14), (512, 7), (2048, 7)]
MOBILENET_V2 = [(32, 112), (96, 56), (144, 56), (24, 56), (192, 28), (384, 14), (576, 14), (960, 7), (1280, 7)]
IMAGES = [(32, c, s, s) for c, s in RESNET50 + MOBILENET_V2]
OTHERS = [(128, 100), (1024, 256), (8192, 1024), (32, 64, 1000), (2, 32, 64, 64, 64)]
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
DTYPES = (torch.float32, torch.bfloat16)
VARIANTS = ("BN", "BN+ReLU", "BN+add+ReLU")
MODES = ("forward", "forward+backward", "eval")
ROUNDS = 9, 400  # at least and at most, after a first one
CHECKED_VALUES = 1 << 20


@dataclass(frozen=True)
class Case:
    """One thing that is timed."""

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

    @property
    def words(self) -> tuple[str, str, str, str, str]:
        """Shape, dtype, layout, what and mode, for a table."""
        layout = "last" if self.last else "first"
        return "x".join(map(str, self.shape)), str(self.dtype)[6:], layout, self.variant, self.mode


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


class WrongResult(ValueError):
    """What is not worth timing: a result that is further from float64 than rounding takes it."""


class Problem:
    """The tensors of a case, and the operation on them by either side."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.differentiated = case.mode == "forward+backward"
        self.training = case.mode != "eval"
        self.activation = None if case.variant == "BN" else "relu"
        values = torch.randn(case.shape).to(case.dtype)
        self.x = values.contiguous(memory_format=LAST[len(case.shape)]) if case.last else values
        self.residual = torch.randn_like(self.x) if case.variant == "BN+add+ReLU" else None
        channels = case.shape[1]
        self.weight, self.bias = torch.rand(channels), torch.randn(channels)
        self.running = torch.zeros(channels), torch.ones(channels)
        self.dy = torch.randn_like(self.x)
        self.leaves = [t for t in (self.x, self.weight, self.bias, self.residual) if t is not None]
        for leaf in self.leaves:
            leaf.requires_grad_(self.differentiated)

    def ours(self) -> Tensor:
        options = {"residual": self.residual, "activation": self.activation}
        return batch_norm(self.x, *self.running, self.weight, self.bias, self.training, **options)

    def torchs(self) -> Tensor:
        y = F.batch_norm(self.x, *self.running, self.weight, self.bias, self.training)
        if self.residual is not None:
            y = y + self.residual
        return y if self.activation is None else F.relu(y)

    def step(self, forward: Callable[[], Tensor]) -> Callable[[], object]:
        """What is timed: the forward pass, with the gradients of everything if the case asks for them."""
        if self.differentiated:
            return lambda: torch.autograd.grad(forward(), self.leaves, self.dy)
        return forward

    def check(self) -> None:
        """Compare ours with float64: y and every gradient, on as many channels as is quickly done.

        Raises:
            WrongResult: where they differ by more than rounding does.
        """
        channels = self.case.shape[1]
        many = max(1, min(channels, CHECKED_VALUES * channels // self.x.numel()))
        picked = torch.linspace(0, channels - 1, many).long()
        x, dy = (t.detach().index_select(1, picked) for t in (self.x, self.dy))
        weight, bias = self.weight.detach()[picked], self.bias.detach()[picked]
        residual = None if self.residual is None else self.residual.detach().index_select(1, picked)
        options = {
            "running": None if self.training else (self.running[0][picked], self.running[1][picked]),
            "residual": residual,
        }
        activation = parse(self.activation)
        exact = reference.forward(x, weight, bias, activation=activation, **options).y
        y = self.ours()
        # y takes some 5 roundings of numbers no larger than the largest |y|, and one more to its own dtype.
        eps, fine = torch.finfo(x.dtype).eps, torch.finfo(torch.float32).eps
        self._compare("y", y.detach().index_select(1, picked), exact, 8 * eps * exact.abs().max())
        if not self.differentiated:
            return
        # Beside ReLU's kink rounding decides what the derivative is: no gradient comes from there.
        z = reference.forward(x, weight, bias, **options).y
        dy = torch.where(z.abs() > 1e-3, dy, 0.0)
        found = torch.autograd.grad(y, self.leaves, self.dy.index_copy(1, picked, dy))
        grads = reference.backward(dy, x, weight, bias, activation=activation, **options)
        # Sums carry the rounding of each of their terms, which are no larger than |dy| * |xhat|.
        terms = 16 * fine * dy.double().abs().sum() * max(1.0, exact.abs().max())
        largest = dy.double().abs().max()
        bounds = (16 * eps * largest, terms, terms, 16 * eps * largest)
        names = ("dx", "dweight", "dbias", "dresidual")
        for name, ours, true, bound in zip(names, found, grads, bounds, strict=False):
            self._compare(name, ours.index_select(min(ours.dim() - 1, 1), picked), true, bound)

    def _compare(self, name: str, ours: Tensor, exact: Tensor, bound: Tensor) -> None:
        error = (ours.double() - exact).abs().max()
        if not error <= bound:
            what = " ".join(self.case.words)
            raise WrongResult(f"{what}: {name} is off by {error:.2g} from float64, over the bound of {bound:.2g}")


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
        torch.compiler.reset()  # else, after a few cases, it would stop compiling anew
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


def interleave(
    functions: dict[str, Callable[[], object]],
    rounds: tuple[int, int],
    seconds: float = 0.0,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each function in each round, in another order every time: what ran before leaves its traces.

    Args:
        functions: what is timed, by name.
        rounds: at least and at most, after a first one that warms up.
        seconds: where at least that many rounds were done, none begins later than this.
        clock: what tells the time that is counted.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    least, most = rounds
    began = time.perf_counter()
    for done in range(most + 1):
        if done > least and time.perf_counter() - began >= seconds:
            break
        for name in random.sample(list(functions), len(functions)):
            start = clock()
            result = functions[name]()
            if done:
                times[name].append(clock() - start)
            del result  # outside the time, for every side
    return times


@dataclass(frozen=True)
class Summary:
    """The geometric mean of torch's time over ours, and the least, over all entries of a dtype, variant and mode."""

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
