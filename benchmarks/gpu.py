"""Times batch normalization on a GPU against torch's, in some minutes, and reports which targets are reached.

    PYTHONPATH=src python benchmarks/gpu.py [--minutes 8] [--only ResNet-50 ...] [--into DIR]
    PYTHONPATH=src python benchmarks/gpu.py --smoke

The first needs an NVIDIA or AMD GPU, torch, Triton and this checkout. It switches our kernels on (BATCHNORM_GPU=1), and
writes benchmarks/results/gpu.md and gpu.json after every case, so that a run that is killed leaves what it had. Every
case is first compared with float64; a wrong case is reported, not timed, and the exit status is 1. Cases that there was
no time for are listed.

The second command runs everything on the CPU with tiny tensors and writes into a temporary folder: its figures are
meaningless.
"""

from __future__ import annotations

import os

os.environ.setdefault("BATCHNORM_GPU", "1")  # read when batchnorm is imported

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from common import RESULTS
from ongpu import measure, steps
from ongpu.entries import BFLOAT16, Entry, entries, shrunk
from ongpu.machines import Cpu, Gpu, Machine, Step
from ongpu.page import Report, cells, name_of, target_line

from batchnorm.bench.timing import interleave

TINY = steps.Size(batch=2, pixels=32, width=4, repeats=(1, 1, 1, 1), checked=(2, 32))
RESERVE_SECONDS = 5.0  # to end in


@dataclass(frozen=True)
class Job:
    """Something that is measured and kept in the report; not begun with less than `seconds` left."""

    series: str
    seconds: float
    run: Callable[[Report], str]
    """Returns what is printed."""


def jobs(machine: Machine, smoke: bool, seconds_left: Callable[[], float]) -> list[Job]:
    """All, the most important first: the whole steps come after the layers of bfloat16, the compiled ones later."""
    size = TINY if smoke else steps.Size()
    found = [_case(shrunk(entry) if smoke else entry, machine) for entry in entries()]
    half = next(i for i, entry in enumerate(entries()) if entry.case.dtype != BFLOAT16)
    late = next(i for i, entry in enumerate(entries()) if entry.case.mode == "forward")
    found.insert(late, _step(steps.COMPILED, machine, size, seconds_left))
    found.insert(half, _step(steps.EAGER, machine, size, seconds_left))
    return found


def _case(entry: Entry, machine: Machine) -> Job:
    def run(report: Report) -> str:
        result = measure.measure(entry, machine)
        report.results.append(result)
        return f"{name_of(entry)}: {result.failed}" if result.failed else f"| {' | '.join(cells(result))} |"

    return Job(entry.series, entry.seconds, run)


def _step(kind: str, machine: Machine, size: steps.Size, seconds_left: Callable[[], float]) -> Job:
    series = f"ResNet-50's step, {kind}"

    def run(report: Report) -> str:
        result = steps.measure(kind, machine, size, seconds_left)
        report.steps.append(result)
        return f"{series}: {result.failed or result.ms}"

    return Job(series, steps.EXPECTED_SECONDS[kind], run)


def copies(machine: Machine) -> list[tuple[int, float]]:
    """Bytes, and GB/s, read and written, of their copy into new memory."""
    tensors = {size: torch.zeros(size, dtype=torch.uint8, device=machine.device) for size in machine.copied}
    functions: dict[str, Step] = {str(size): lambda x=x: torch.empty_like(x).copy_(x) for size, x in tensors.items()}
    times = interleave(functions, machine.rounds, machine.seconds, machine.events)
    return [(size, 2 * size / statistics.median(times[str(size)]) / 1e9) for size in tensors]


def run(machine: Machine, report: Report, todo: Sequence[Job], folder: Path, seconds_left: Callable[[], float]) -> None:
    """Do the jobs that there is time for; the report is written after each."""
    report.copies = copies(machine)
    left, lost = [], ""
    for i, job in enumerate(todo):
        report.left_out = [*left, *(each.series for each in todo[i:])]
        report.why_left_out = lost or "the run was stopped"
        report.save(folder)
        if lost or seconds_left() < job.seconds:
            left.append(job.series)
        else:
            print(job.run(report), flush=True)
            lost = _lost(machine)
    report.left_out, report.why_left_out = left, lost or ("the time was up" if left else "")
    report.save(folder)


def _lost(machine: Machine) -> str:
    """Why the device computes no more; empty if it does."""
    try:
        machine.free()
    except RuntimeError as error:
        return f"the device was lost: {measure.said(error)}"
    return ""


def main(arguments: Sequence[str] | None = None) -> int:
    began = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="begin nothing that would take longer")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="only what has one of these in its series")
    parser.add_argument("--into", type=Path, help="where gpu.md and gpu.json go")
    parser.add_argument("--smoke", action="store_true", help="tiny tensors, on the CPU")
    options = parser.parse_args(arguments)
    if not options.smoke and not torch.cuda.is_available():
        parser.error("PyTorch sees no GPU; --smoke runs all of it on the CPU, with tiny tensors")

    def seconds_left() -> float:
        return options.minutes * 60 - RESERVE_SECONDS - (time.perf_counter() - began)

    machine: Machine = Cpu() if options.smoke else Gpu()
    folder = options.into or (Path(tempfile.mkdtemp(prefix="gpu-smoke-")) if options.smoke else RESULTS)
    report = Report(machine.facts() | {"BATCHNORM_GPU": os.environ["BATCHNORM_GPU"]}, options.smoke)
    todo = jobs(machine, options.smoke, seconds_left)
    if options.only:
        todo = [job for job in todo if any(word in job.series for word in options.only)]
    run(machine, report, todo, folder, seconds_left)
    print("\n".join(map(target_line, report.targets)))
    print(f"{folder / 'gpu.md'}: {time.perf_counter() - began:.0f} s, {len(report.left_out)} left out")
    return int(any(result.failed.startswith("wrong") for result in [*report.results, *report.steps]))


if __name__ == "__main__":
    sys.exit(main())
