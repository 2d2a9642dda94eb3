"""Real processes: runs a function in every rank of a gloo process group and returns what each rank returned."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import multiprocessing
import sys
import tempfile
import time
import traceback
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import native_forced
import torch
import torch.distributed as dist

# A server that has imported torch once forks the ranks: in a few hundredths of a second, and without pytest's threads.
_CONTEXT = multiprocessing.get_context("forkserver")
# torch._dynamo: DistributedDataParallel imports it at the first step.
_CONTEXT.set_forkserver_preload(["ranks", "native_forced", "torch._dynamo", "torch.testing", "pytest", "batchnorm.nn"])


def run(function: Any, world: int = 2, *args: Any, seconds: float = 60.0, timeout: float = 20.0) -> list[Any]:
    """What function(rank, *args) returned on each of `world` ranks; raises with the tracebacks of those that failed.

    Args:
        function: at the top of a test's module, which each rank imports by its path.
        world: how many ranks.
        args: whatever torch.save takes, as do the results.
        seconds: after which all ranks are killed.
        timeout: of the group's collectives, in seconds.
    """
    found = outcomes(function, world, *args, seconds=seconds, timeout=timeout)
    failed = [f"rank {rank}:\n{error}" for rank, (_, error) in enumerate(found) if error]
    assert not failed, "\n".join(failed)
    return [value for value, _ in found]


def outcomes(
    function: Any, world: int, *args: Any, seconds: float = 60.0, timeout: float = 20.0
) -> list[tuple[Any, str | None]]:
    """(result, None) or (None, traceback) of each rank; of one that was killed, or had to be, it says so."""
    with tempfile.TemporaryDirectory() as folder:
        pipes, ranks = [], []
        for rank in range(world):
            ours, theirs = _CONTEXT.Pipe(duplex=False)
            target = (function.__code__.co_filename, function.__name__, rank, world, f"{folder}/store", timeout, theirs)
            process = _CONTEXT.Process(target=_rank, args=(*target, _packed(args)), daemon=True)
            process.start()
            theirs.close()
            pipes.append(ours)
            ranks.append(process)
        found: list[tuple[Any, str | None]] = [(None, "had to be killed: it neither ended nor failed in time")] * world
        waiting, deadline = dict(zip(pipes, range(world), strict=True)), time.monotonic() + seconds
        while waiting and time.monotonic() < deadline:
            for pipe in wait(list(waiting), timeout=1.0):
                rank = waiting.pop(pipe)  # pyright: ignore[reportArgumentType]
                try:
                    found[rank] = _unpacked(pipes[rank].recv_bytes())
                except EOFError:
                    ranks[rank].join()
                    found[rank] = (None, f"died with exit code {ranks[rank].exitcode}")
        for process in ranks:
            if process.is_alive() and waiting:
                process.kill()
            process.join()
    return found


def _rank(path: str, name: str, rank: int, world: int, store: str, timeout: float, pipe: Any, args: bytes) -> None:
    torch.set_num_threads(1)
    native_forced.if_asked()
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=timeout)
        )
        outcome = (getattr(_module(path), name)(rank, *_unpacked(args)), None)
    except BaseException:
        outcome = (None, traceback.format_exc())
    pipe.send_bytes(_packed(outcome))
    pipe.close()
    with contextlib.suppress(Exception):  # others may be gone
        dist.destroy_process_group()


def _module(path: str) -> Any:
    name = Path(path).stem
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def _packed(value: Any) -> bytes:
    """Not through shared memory, which ends with the rank that made it."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _unpacked(packed: bytes) -> Any:
    return torch.load(io.BytesIO(packed), weights_only=False)


class counting:
    """Counts the calls of torch.distributed's collectives."""

    names = ("all_gather_single", "all_gather_into_tensor", "all_gather", "all_reduce", "broadcast", "barrier")

    def __init__(self, into):
        self.into = into

    def __enter__(self):
        self.kept = {name: getattr(dist, name) for name in self.names if hasattr(dist, name)}
        for name, collective in self.kept.items():
            setattr(dist, name, self.counted(name, collective))

    def counted(self, name, collective):
        def call(*args, **kwargs):
            self.into[name] = self.into.get(name, 0) + 1
            return collective(*args, **kwargs)

        return call

    def __exit__(self, *exc):
        for name, collective in self.kept.items():
            setattr(dist, name, collective)
