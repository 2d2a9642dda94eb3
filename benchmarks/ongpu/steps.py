"""Whole training steps of ResNet-50: torch's layers, ours, and ours fused, in turns, eager and compiled."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from networks import resnet50
from torch import Tensor, nn
from zoo.steps import WIDE, errors, step

import batchnorm as bn
from batchnorm.bench.problem import WrongResult
from batchnorm.bench.timing import interleave

from .machines import Machine
from .measure import EVENTS, WALL, Times, said

TORCH, CONVERTED, FUSED = "torch", "convert", "convert, fuse"
LONGER = 20  # than a single layer is timed
CALLS = 3  # a round of the wall's clock
EAGER, COMPILED = "eager", "compiled"
EXPECTED_SECONDS = {EAGER: 25.0, COMPILED: 90.0}
COMPILE_SECONDS = 45.0  # of one side, before any has said how long it takes


@dataclass(frozen=True)
class Size:
    """Of a network and its batch; `checked` of those that are compared in float64."""

    batch: int = 256
    pixels: int = 224
    width: int = 64
    repeats: tuple[int, ...] = (3, 4, 6, 3)
    checked: tuple[int, int] = (4, 96)


@dataclass
class Result:
    """Medians over rounds of the steps of one kind, by clock and side; ratios of torch's time to the side's."""

    kind: str
    ms: Times = field(default_factory=dict)
    ratios: Times = field(default_factory=dict)
    peak_gb: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    failed: str = ""


class Training:
    """A network and a step of it: bfloat16 by autocast, SGD with momentum."""

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        self.model, self.x = model, x
        self.target = torch.arange(len(x), device=x.device) % 1000
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def step(self) -> None:
        self.optimizer.zero_grad()
        with torch.autocast(self.x.device.type, dtype=torch.bfloat16):
            loss = nn.functional.cross_entropy(self.model(self.x), self.target)
        loss.backward()
        self.optimizer.step()


def measure(kind: str, machine: Machine, size: Size, seconds_left: Callable[[], float]) -> Result:
    """Compare one step of ours in float64, then time the three in turns; what fails is said in the result."""
    result = Result(kind)
    try:
        torch.manual_seed(0)
        _check(machine, size)
        networks = variants(_network(machine, size))
        x = torch.randn(size.batch, 3, size.pixels, size.pixels, device=machine.device)
        x = x.contiguous(memory_format=torch.channels_last)
        if kind == COMPILED:
            for model in networks.values():
                model.compile(**machine.compiled["compile"])
        trainings = {name: Training(model, x) for name, model in networks.items()}
        _time(_warmed_up(trainings, kind, machine, result, seconds_left), machine, result)
    except Exception as error:  # the driver's and the compiler's are of many types
        result.failed = said(error)
    finally:
        if kind == COMPILED:
            torch.compiler.reset()
    return result


def variants(model: nn.Module) -> dict[str, nn.Module]:
    """The network with torch's layers, with ours, and with ours fused, from the same weights."""
    return {
        TORCH: model,
        CONVERTED: bn.convert(copy.deepcopy(model)),
        FUSED: bn.convert(copy.deepcopy(model), fuse=True),
    }


def _network(machine: Machine, size: Size) -> nn.Module:
    network = resnet50(width=size.width, repeats=size.repeats)
    return network.to(machine.device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def _check(machine: Machine, size: Size) -> None:
    """Outputs, gradients and running statistics of one step in float64, to the bound that zoo/steps.py explains.

    How exact ours is in bfloat16, the single layers' cases say. This says that every layer gets what it should.
    """
    items, pixels = size.checked
    x = torch.randn(items, 3, pixels, pixels, device=machine.device, dtype=torch.float64)
    networks = variants(_network(machine, size).double())
    exact = step(networks.pop(TORCH), x)
    for name, model in networks.items():
        for part, error in errors(step(model, x), exact).items():
            if not error <= WIDE:
                raise WrongResult(f"{name}: {part} is off by {error:.2g} from torch's step in float64")


def _warmed_up(
    trainings: dict[str, Training], kind: str, machine: Machine, result: Result, seconds_left: Callable[[], float]
) -> dict[str, Callable[[], object]]:
    """The steps, each taken once, which compiles it; of those that there is no time to compile, a note."""
    steps: dict[str, Callable[[], object]] = {}
    needed = COMPILE_SECONDS if kind == COMPILED else 0.0
    for name, training in trainings.items():
        before = seconds_left()
        if before < needed:
            result.notes.append(f"{name}: left out, for the time was up")
            continue
        training.step()
        needed = max(needed, before - seconds_left()) if kind == COMPILED else 0.0
        result.peak_gb[name] = machine.peak_bytes(training.step) / 1e9
        steps[name] = training.step
    return steps


def _time(steps: dict[str, Callable[[], object]], machine: Machine, result: Result) -> None:
    if TORCH not in steps:
        return
    for clock, timed in {EVENTS: machine.events, WALL: partial(machine.wall, calls=CALLS)}.items():
        times = interleave(steps, machine.rounds, LONGER * machine.seconds, timed)
        result.ms[clock] = {name: statistics.median(values) * 1e3 for name, values in times.items()}
        pairs = {name: zip(times[TORCH], values, strict=True) for name, values in times.items() if name != TORCH}
        result.ratios[clock] = {name: statistics.median(a / b for a, b in values) for name, values in pairs.items()}
