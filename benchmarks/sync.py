"""What synchronizing costs: a layer's forward and backward in two processes, with and without it, alternating.

    python benchmarks/sync.py [--rounds 50]

prints a table and writes it to benchmarks/results/sync.md. Both processes run on this machine, with one thread each,
and talk by gloo. Times are CPU time, medians over the rounds: the work that synchronizing adds, independent of other
load. The wait for two collectives, of 3 C and 2 C float64 numbers, comes on top and depends on the network.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import time
from multiprocessing.connection import Connection

import torch
import torch.distributed as dist
from common import header, save

import batchnorm as bn

SHAPES = ((32, 64, 56, 56), (32, 256, 14, 14), (32, 2048, 7, 7), (256, 100))


def times(shape: tuple[int, ...], rounds: int) -> tuple[float, float]:
    """Milliseconds of a step without and with the other rank."""
    layer = bn.SyncBatchNorm(shape[1])
    x = torch.randn(shape, requires_grad=True)
    found: dict[bool, list[float]] = {False: [], True: []}
    for index in range(rounds + 5):
        for sync in (False, True):
            layer.sync = sync
            dist.barrier()
            began = time.process_time()
            y = layer(x)
            torch.autograd.grad(y, (x, *layer.parameters()), y.detach())
            if index >= 5:
                found[sync].append((time.process_time() - began) * 1e3)
    return statistics.median(found[False]), statistics.median(found[True])


def measure(rank: int, store: str, rounds: int, pipe: Connection) -> None:
    """One rank's measurements."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    pipe.send([times(shape, rounds) for shape in SHAPES])
    dist.destroy_process_group()


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=50)
    rounds = parser.parse_args().rounds
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        receiver, sender = context.Pipe(duplex=False)
        processes = [context.Process(target=measure, args=(r, f"{folder}/store", rounds, sender)) for r in range(2)]
        for process in processes:
            process.start()
        found = receiver.recv()
        for process in processes:
            process.join()
    note = (
        "Two processes, one thread each, by gloo: forward and backward of one layer, processor time without the wait."
    )
    lines = [
        *header("What synchronizing costs", note),
        "| shape | plain, ms | synchronized, ms | added, ms |",
        "|---|---|---|---|",
    ]
    for shape, (plain, sync) in zip(SHAPES, found, strict=True):
        lines.append(f"| {'x'.join(map(str, shape))} | {plain:.2f} | {sync:.2f} | {sync - plain:.2f} |")
    print("\n".join(lines))
    save("sync", lines)


if __name__ == "__main__":
    main()
