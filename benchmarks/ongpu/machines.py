"""The GPU and its clocks; and a CPU in its place, so that all the rest runs, and is tested, without one."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any, ClassVar, Protocol

import torch

from batchnorm.bench.timing import WALL

Step = Callable[[], object]
Asked = dict[str, dict[str, Any]]

# The L2 cache of an H100 or H200 holds 50 MB, a B200's 126 MB: what was there before a call is gone after this.
FILL_BYTES = 512 << 20
# Each takes an H200 some 0.13 ms. The host takes up to some 0.3 ms to ask for a forward and a backward pass.
FILLS, MOST_FILLS = 4, 32
CALLS = 10
WARM_UPS = 2  # before a capture, on a stream of its own
VALUE_BYTES = 256  # that comparing one value with float64 takes, all intermediate results together


class Machine(Protocol):
    """Where steps run, and what times them."""

    device: torch.device
    compiled: ClassVar[Asked]
    """What torch.compile is asked for, by name."""
    rounds: tuple[int, int]
    """How often a step is timed by each clock: at least and at most ..."""
    seconds: float
    """... and for about how long, with what it is compared with."""
    copied: tuple[int, ...]
    """Bytes of the copies that are timed."""
    checked_values: int
    """How many values of a tensor are compared with float64."""
    no_replay: str
    """Why steps cannot be replayed; empty if they can."""

    def facts(self) -> dict[str, str]:
        """What figures depend on."""
        ...

    def events(self, step: Step) -> float:
        """Seconds that the device takes for the step, none of it cached, and nothing waited for."""
        ...

    def wall(self, step: Step, calls: int = CALLS) -> float:
        """Seconds a step of so many in a row, from an idle device to an idle device."""
        ...

    def replayed(self, step: Step) -> Step:
        """The step as a graph, which the device runs without the host."""
        ...

    def free(self) -> None:
        """Give back memory that nobody uses; raises where the device is lost."""
        ...

    def peak_bytes(self, step: Step) -> int:
        """The most memory that the step had in use at a time, beside what was in use before."""
        ...


class Gpu:
    """The first GPU: NVIDIA's, or AMD's, which PyTorch calls cuda too."""

    compiled: ClassVar[Asked] = {
        "compile": {},
        # "max-autotune" would put CUDA graphs into the step, which copy its inputs, and which cannot be captured again.
        "max-autotune": {"mode": "max-autotune-no-cudagraphs"},
    }
    rounds: tuple[int, int] = (5, 60)
    seconds = 0.15
    copied: tuple[int, ...] = tuple(mb << 20 for mb in (1, 4, 16, 64, 256, 1024))
    no_replay = ""

    def __init__(self) -> None:
        self.device = torch.device("cuda", 0)
        torch.cuda.set_device(self.device)
        self.checked_values = torch.cuda.mem_get_info(self.device)[0] // VALUE_BYTES
        self._filled = torch.empty(FILL_BYTES, dtype=torch.uint8, device=self.device)
        self._fills = FILLS
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def facts(self) -> dict[str, str]:
        properties = torch.cuda.get_device_properties(self.device)
        major, minor = torch.cuda.get_device_capability(self.device)
        hip, cudnn = torch.version.hip, torch.backends.cudnn.version()
        return {
            "device": properties.name,
            "architecture": properties.gcnArchName if hip else f"sm_{major}{minor}",
            "memory": f"{properties.total_memory / 2**30:.0f} GiB",
            "processors": str(properties.multi_processor_count),
            "runtime": f"ROCm {hip}" if hip else f"CUDA {torch.version.cuda}",
            "cuDNN": str(cudnn) if cudnn else "none",
            "triton": triton_version(),
        }

    def events(self, step: Step) -> float:
        while True:
            for _ in range(self._fills):
                self._filled.zero_()
            self._start.record()
            result = step()
            self._end.record()
            # Is the device still filling, now that all is asked for? Else it may have waited for the host in between.
            ahead = not self._start.query()
            self._end.synchronize()
            del result
            if ahead or self._fills >= MOST_FILLS:
                return self._start.elapsed_time(self._end) / 1e3
            self._fills *= 2

    def wall(self, step: Step, calls: int = CALLS) -> float:
        torch.cuda.synchronize(self.device)
        begin = time.perf_counter()
        for _ in range(calls):
            step()
        torch.cuda.synchronize(self.device)
        return (time.perf_counter() - begin) / calls

    def replayed(self, step: Step) -> Step:
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                step()
        before = torch.cuda.current_stream(self.device)
        before.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # A capture that fails leaves its own stream the current one; the outer context does not.
        with torch.cuda.stream(before), torch.cuda.graph(graph):
            result = step()

        def replay() -> object:
            graph.replay()
            return result  # which is written anew each time

        return replay

    def free(self) -> None:
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()
        self._fills = FILLS

    def peak_bytes(self, step: Step) -> int:
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        step()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - before


class Cpu:
    """A stand-in: its times are the processor's, and no figures of anything."""

    device = torch.device("cpu")
    compiled: ClassVar[Asked] = {"compile": {"backend": "eager"}, "max-autotune": {"backend": "eager"}}
    rounds: tuple[int, int] = (1, 1)
    seconds = 0.0
    copied: tuple[int, ...] = (1 << 12, 1 << 14)
    checked_values = 1 << 20
    no_replay = "a CPU has no graphs to replay"

    def facts(self) -> dict[str, str]:
        return {"device": "CPU", "triton": triton_version()}

    def events(self, step: Step) -> float:
        return WALL(step)

    def wall(self, step: Step, calls: int = CALLS) -> float:
        begin = time.perf_counter()
        for _ in range(calls):
            step()
        return (time.perf_counter() - begin) / calls

    def replayed(self, step: Step) -> Step:
        raise NotImplementedError(self.no_replay)

    def free(self) -> None:
        pass

    def peak_bytes(self, step: Step) -> int:
        step()
        return 0


def triton_version() -> str:
    """Triton's version, whatever the package that brings it is called."""
    if importlib.util.find_spec("triton") is None:
        return "none"
    try:
        return version("triton")
    except ModuleNotFoundError:
        import triton

        return triton.__version__
