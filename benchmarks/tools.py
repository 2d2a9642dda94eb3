"""What the tools cost: training steps of ResNet-20 with each tool and with none, alternating, in one process.

    python benchmarks/tools.py [--rounds 15] [--threads 1]

prints a table and writes it to benchmarks/results/tools.md. In every round each variant takes one step, in a new order;
a ratio is the median, over the rounds, of a variant's step to the plain step of the same round.
"""

from __future__ import annotations

import argparse
import copy
import timeit
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from common import header, ratios, save
from record import resnet20
from torch import nn
from torch.utils.checkpoint import checkpoint

import batchnorm as bn
from batchnorm.nn.recompute import recomputing


def variants(model: nn.Module, x: torch.Tensor) -> dict[str, Callable[[], object]]:
    """A step of each kind, on a copy of the model each."""

    def step(model: nn.Module) -> None:
        model(x).square().mean().backward()

    def within(block: Callable[[nn.Module], AbstractContextManager[None]]) -> Callable[[], object]:
        twin = copy.deepcopy(model)

        def run() -> None:
            with block(twin):
                step(twin)

        return run

    def step_recomputed() -> None:
        y = checkpoint(recomputed, x, use_reentrant=False)
        assert y is not None
        y.square().mean().backward()

    plain, stats, both, recomputed = (copy.deepcopy(model) for _ in range(4))
    bn.freeze(stats)
    bn.freeze(both, affine=True)
    return {
        "plain": lambda: step(plain),
        "freeze(model)": lambda: step(stats),
        "freeze(model, affine=True)": lambda: step(both),
        "no_update(model)": within(bn.no_update),
        "accumulate(model)": within(bn.accumulate),
        "checkpoint of the model": step_recomputed,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, x = resnet20()
    theirs = ratios(variants(model, x), options.rounds)
    ours = ratios(variants(bn.convert(model), x), options.rounds)
    nanoseconds = min(timeit.repeat(recomputing, number=10_000, repeat=50)) * 1e5
    note = (
        "ResNet-20, forward and backward, 64 images of 32x32: the time of a step beside that of a plain step with the "
        "same layers. A layer's check whether it is being recomputed takes "
        f"{nanoseconds:.0f} ns."
    )
    lines = header("What the tools cost", note)
    lines += ["| step | torch.nn's layers | batchnorm's layers |", "|---|---|---|"]
    lines += [f"| {name} | {theirs[name]:.2f} | {ours[name]:.2f} |" for name in theirs]
    print("\n".join(lines))
    save("tools", lines)


if __name__ == "__main__":
    main()
