"""What whole training steps gain: torch's layers against ours, fused, in turns, in one process.

    python benchmarks/model.py [--batch 32] [--pairs 12]

prints a table and writes it to benchmarks/results/model.md. Both models start from the same weights and take the same
steps in turns; the ratio is the median over pairs of neighbouring steps. Memory is what autograd keeps between forward
and backward, each storage counted once.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time

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


def compare(build: type | object, memory_format: torch.memory_format, batch: int, pairs: int) -> tuple[float, ...]:
    """Seconds of a step, theirs and ours (medians); quartiles of the paired ratio; megabytes kept, theirs and ours."""
    torch.manual_seed(0)
    x = torch.randn(batch, 3, 32, 32).to(memory_format=memory_format)
    theirs = build().to(memory_format=memory_format)  # pyright: ignore[reportCallIssue]
    ours = bn.convert(copy.deepcopy(theirs), fuse=True)
    a, b = Training(theirs, x), Training(ours, x)
    for _ in range(2):
        a.step()
        b.step()
    times = []
    for k in range(pairs):
        # Who goes first changes in turns, so that a drift of the machine's speed cancels.
        if k % 2:
            second, first = b.step(), a.step()
        else:
            first, second = a.step(), b.step()
        times.append((first, second))
    low, middle, high = statistics.quantiles([first / second for first, second in times], n=4)
    return (
        *(statistics.median(column) for column in zip(*times, strict=True)),
        low,
        middle,
        high,
        a.kept_mb(),
        b.kept_mb(),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--pairs", type=int, default=12)
    options = parser.parse_args()
    lines = [
        *header("Whole training steps", "Images of 32x32, float32; ours is `convert(model, fuse=True)`."),
        "| model | layout | torch, ms | ours, ms | faster by (quartiles of pairs) | kept, torch, MB | kept, ours, MB |",
        "|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    for build in (mobilenet_v2, resnet18):
        for memory_format in (torch.contiguous_format, torch.channels_last):
            theirs, ours, low, middle, high, kept_theirs, kept_ours = compare(
                build, memory_format, options.batch, options.pairs
            )
            layout = str(memory_format).removeprefix("torch.").removesuffix("_format")
            lines.append(
                f"| {build.__name__} | {layout} | {theirs * 1e3:.0f} | {ours * 1e3:.0f} "
                f"| {middle:.2f}x ({low:.2f} to {high:.2f}) | {kept_theirs:.0f} | {kept_ours:.0f} |"
            )
            print(lines[-1], flush=True)
    save("model", lines)


if __name__ == "__main__":
    main()
