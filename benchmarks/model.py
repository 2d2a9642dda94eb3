"""What whole training steps gain: torch's layers, ours, and ours fused, alternating, in one process.

    python benchmarks/model.py [--batch 32] [--rounds 12]

prints a table and writes it to benchmarks/results/model.md. All models start from the same weights and take the same
steps in turns; a ratio is the median over rounds. Memory is what autograd keeps between forward and backward, each
storage counted once.
"""

from __future__ import annotations

import argparse
import copy
import random
import statistics
import time
from collections.abc import Callable

import torch
from common import header, save
from networks import mobilenet_v2, resnet18
from torch import Tensor, nn

import batchnorm as bn


class Training:
    """A model, its optimizer, and one batch of random images."""

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        self.model, self.x = model, x
        self.target = torch.arange(len(x)) % 10
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def step(self) -> float:
        """One training step; returns its seconds."""
        begin = time.perf_counter()
        self.optimizer.zero_grad()
        nn.functional.cross_entropy(self.model(self.x), self.target).backward()
        self.optimizer.step()
        return time.perf_counter() - begin

    def kept_mb(self) -> float:
        """Megabytes that a step keeps for its backward pass, parameters aside."""
        storages = {}
        parameters = {p.data_ptr() for p in self.model.parameters()}

        def keep(tensor: Tensor) -> Tensor:
            if tensor.data_ptr() not in parameters:
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            y = self.model(self.x)
        del y
        return sum(storages.values()) / 1e6


def compare(build: Callable[[], nn.Module], memory_format: torch.memory_format, batch: int, rounds: int) -> list[str]:
    """Rows of the table: torch's layers, ours, and ours fused, stepping in turns."""
    torch.manual_seed(0)
    x = torch.randn(batch, 3, 32, 32).to(memory_format=memory_format)
    theirs = build().to(memory_format=memory_format)  # pyright: ignore[reportCallIssue]
    sides = {
        "torch": Training(theirs, x),
        "convert": Training(bn.convert(copy.deepcopy(theirs)), x),
        "convert, fuse": Training(bn.convert(copy.deepcopy(theirs), fuse=True), x),
    }
    times: dict[str, list[float]] = {name: [] for name in sides}
    for k in range(rounds + 2):
        # A new order every round: each run affects the next, and a drift of the machine's speed cancels.
        for name in random.sample(list(sides), len(sides)):
            seconds = sides[name].step()
            if k >= 2:
                times[name].append(seconds)
    layout = str(memory_format).removeprefix("torch.").removesuffix("_format")
    rows = []
    for name, side in sides.items():
        paired = [a / b for a, b in zip(times["torch"], times[name], strict=True)]
        low, middle, high = statistics.quantiles(paired, n=4)
        faster = "" if name == "torch" else f"{middle:.2f}x ({low:.2f} to {high:.2f})"
        milliseconds = statistics.median(times[name]) * 1e3
        rows.append(
            f"| {build.__name__} | {layout} | {name} | {milliseconds:.0f} | {faster} | {side.kept_mb():.0f} |"  # pyright: ignore[reportFunctionMemberAccess]
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=12)
    options = parser.parse_args()
    lines = [
        *header(
            "Whole training steps",
            "Images of 32x32, float32. The gain of fusing is the difference between the second row and the third.",
        ),
        "| model | layout | layers | step, ms | faster than torch (quartiles of rounds) | kept for backward, MB |",
        "|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    for build in (mobilenet_v2, resnet18):
        for memory_format in (torch.contiguous_format, torch.channels_last):
            rows = compare(build, memory_format, options.batch, options.rounds)
            lines += rows
            print("\n".join(rows), flush=True)
    save("model", lines)


if __name__ == "__main__":
    main()
