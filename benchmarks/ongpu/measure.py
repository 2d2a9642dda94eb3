"""One entry: compared with float64, then timed by events, in a row, and as a graph, in turns with torch's."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

import batchnorm as bn
from batchnorm.bench.problem import Problem, WrongResult
from batchnorm.bench.timing import interleave

from .entries import Entry
from .machines import Machine, Step

OURS, COPY, EAGER, WITHOUT_CUDNN = "ours", "copy", "eager", "eager, cuDNN off"
EVENTS, GRAPH, WALL = "events", "graph", "wall"
LAYERS = {2: bn.BatchNorm1d, 3: bn.BatchNorm1d, 4: bn.BatchNorm2d, 5: bn.BatchNorm3d}

Times = dict[str, dict[str, float]]  # by clock and by side


@dataclass
class Result:
    """What was measured of an entry: medians over rounds, and of ratios within a round."""

    entry: Entry
    served_by: str = ""
    us: Times = field(default_factory=dict)
    ratios: Times = field(default_factory=dict)
    """Of a side's time to ours: above 1, ours is faster."""
    notes: list[str] = field(default_factory=list)
    """What could not be measured, and why."""
    failed: str = ""
    """Why nothing was measured."""

    @property
    def device(self) -> str:
        """The clock by which the device's time is told: the graph's, for that has no host in it."""
        return GRAPH if GRAPH in self.us else EVENTS

    @property
    def device_us(self) -> dict[str, float]:
        """The device's time of each side."""
        return self.us[self.device]

    def ratio(self, side: str, clock: str | None = None) -> float | None:
        """By the device's time, or that clock; None where the side was not timed."""
        return self.ratios.get(clock or self.device, {}).get(side)

    def eager(self, clock: str | None = None) -> float | None:
        """Beside the faster of torch with and without cuDNN."""
        found = [self.ratio(side, clock) for side in (EAGER, WITHOUT_CUDNN)]
        return min((ratio for ratio in found if ratio is not None), default=None)

    @property
    def fraction(self) -> float | None:
        """Of the floor: the bytes that two passes over memory move, at the bandwidth of a copy of the tensor, 2 T."""
        copy = self.ratio(COPY)
        return None if copy is None else copy * self.entry.case.traffic(resident=False) / 2


def measure(entry: Entry, machine: Machine) -> Result:
    """Compare, then time; what fails is said in the result."""
    result = Result(entry)
    try:
        torch.manual_seed(0)
        problem = Problem(entry.case, machine.device)
        problem.check(machine.checked_values)
        functions = sides(problem, entry.compiled, machine, result.notes)
        _time(functions, machine, result)
        result.served_by = served_by(problem)
    except Exception as error:  # the driver's and the compiler's are of many types
        result.failed = said(error)
    finally:
        if entry.compiled:
            torch.compiler.reset()  # else it would stop compiling anew after a few entries, and keep their tensors
    return result


def sides(problem: Problem, compiled: tuple[str, ...], machine: Machine, notes: list[str]) -> dict[str, Step]:
    """What is timed, each called once; what of torch.compile raises is left out, with a note."""
    x = problem.x.detach()
    functions: dict[str, Step] = {
        COPY: lambda: torch.empty_like(x).copy_(x),
        OURS: problem.step(problem.ours),
        EAGER: problem.step(problem.torchs),
    }
    if x.dim() > 2:  # of rows torch never asks cuDNN
        functions[WITHOUT_CUDNN] = problem.step(lambda: without_cudnn(problem))
    for function in functions.values():
        function()
    for name in compiled:
        function = _or_note(name, partial(_compiled, problem, machine.compiled[name]), notes)
        if function is not None:
            functions[name] = function
    return functions


def _compiled(problem: Problem, asked: dict[str, Any]) -> Step:
    """torch's step, compiled."""
    forward: Callable[[], Tensor] = torch.compile(problem.torchs, fullgraph=True, dynamic=False, **asked)
    step = problem.step(forward)
    step()
    return step


def without_cudnn(problem: Problem) -> Tensor:
    """torch's with cuDNN off.

    torch.nn.functional.batch_norm passes the flag torch.backends.cudnn.enabled on as the last argument; a context that
    sets the flag would take as long on the host as a small layer.
    """
    mean, var = problem.running
    z = torch.batch_norm(problem.x, problem.weight, problem.bias, mean, var, problem.training, 0.1, 1e-5, False)
    return problem.finish(z)


def served_by(problem: Problem) -> str:
    """Which implementation serves the case, after all that was called: one that turned out wrong serves no more."""
    case = problem.case
    layer = LAYERS[len(case.shape)](case.shape[1], activation=problem.activation).to(problem.x.device)
    return bn.backends(layer.train(problem.training), problem.x).served_by or "nobody"


def said(error: Exception) -> str:
    """The error in a line."""
    if isinstance(error, WrongResult):
        return f"wrong: {error}"
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"


def _time(functions: dict[str, Step], machine: Machine, result: Result) -> None:
    clocks = {EVENTS: machine.events, WALL: machine.wall}
    for clock, timed in clocks.items():
        _keep(result, clock, interleave(functions, machine.rounds, machine.seconds, timed))
    if machine.no_replay:
        result.notes.append(f"{GRAPH}: {machine.no_replay}")
        return
    # Last, for a capture gives back all memory that is cached.
    replays: dict[str, Step] = {}
    for name, function in functions.items():
        replay = _or_note(f"{name} as a graph", partial(machine.replayed, function), result.notes)
        if replay is not None:
            replays[name] = replay
    if {OURS, COPY, EAGER} <= replays.keys():  # else one clock would not tell what is to be compared
        _keep(result, GRAPH, interleave(replays, machine.rounds, machine.seconds, machine.events))


def _keep(result: Result, clock: str, times: dict[str, list[float]]) -> None:
    result.us[clock] = {name: statistics.median(values) * 1e6 for name, values in times.items()}
    pairs = {name: zip(values, times[OURS], strict=True) for name, values in times.items() if name != OURS}
    result.ratios[clock] = {name: statistics.median(a / b for a, b in values) for name, values in pairs.items()}


def _or_note(name: str, make: Callable[[], Step], notes: list[str]) -> Step | None:
    """What it returns; None where it raises, with a note."""
    try:
        return make()
    except Exception as error:
        notes.append(f"{name}: {said(error)}")
    return None
