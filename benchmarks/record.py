"""What recording costs: watched and unwatched training steps, alternating, in one process.

    python benchmarks/record.py [--pairs 15] [--threads 1]

prints a table and writes it to benchmarks/results/record.md. Blocks of watched and of unwatched steps alternate, so
that the machine's other work affects both alike. The overhead is the median, over the pairs of neighboring blocks, of
the ratio of their median steps. The table also has times that a busy machine disturbs less: the time that the training
thread spends in the recorder's hooks, the CPU time of the writer's thread, and the share of both together in a step.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from itertools import pairwise
from typing import Any, Literal
from unittest.mock import patch

import torch
from common import header, save
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.watch import Recorder
from batchnorm.watch.hooks import LayerWatch
from batchnorm.watch.steps import Steps

BLOCK_SECONDS = 1.0
Every = int | Literal["auto"]


def mlp() -> tuple[nn.Module, Tensor]:
    """Ioffe & Szegedy 2015, 4.1: three layers of 100 sigmoid units, batches of 60 images of 28x28."""
    layers: list[nn.Module] = []
    for a, b in pairwise([784, 100, 100, 100]):
        layers += [nn.Linear(a, b), nn.BatchNorm1d(b), nn.Sigmoid()]
    return nn.Sequential(*layers, nn.Linear(100, 10)), torch.randn(60, 784)


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut."""

    def __init__(self, a: int, b: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(a, b, 3, b // a, 1, bias=False), nn.BatchNorm2d(b)
        self.conv2, self.bn2 = nn.Conv2d(b, b, 3, 1, 1, bias=False), nn.BatchNorm2d(b)
        self.short = nn.Identity() if a == b else nn.Conv2d(a, b, 1, b // a, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + self.short(x))


def resnet20() -> tuple[nn.Module, Tensor]:
    """He et al. 2016, 4.2: 19 batch-norm layers of 16 to 64 channels, batches of 64 images of 32x32."""
    blocks = [Block(a, b) for a, b in pairwise([16, 16, 16, 16, 32, 32, 32, 64, 64, 64])]
    stem = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)]
    return nn.Sequential(*stem, *blocks, *head), torch.randn(64, 3, 32, 32)


class Training:
    """A model and its steps, on one batch: what a batch holds makes no difference to the time."""

    def __init__(self, model: nn.Module, x: Tensor, every: Every) -> None:
        self.model, self.x = model, x
        self.every: Every = every
        self.target = torch.randint(10, (len(x),))
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def block(self, steps: int) -> float:
        """Take so many steps; returns the median step in seconds."""
        times = []
        for _ in range(steps):
            begin = time.perf_counter()
            self.optimizer.zero_grad()
            nn.functional.cross_entropy(self.model(self.x), self.target).backward()
            self.optimizer.step()
            times.append(time.perf_counter() - begin)
        return statistics.median(times)

    def watched_block(self, steps: int) -> tuple[float, float]:
        """The same, watched; and the CPU seconds of the writer's thread a step."""
        with tempfile.TemporaryDirectory() as folder, self._watch(folder):
            step = self.block(steps)
            (writer,) = (thread for thread in threading.enumerate() if thread.name == "batchnorm-recorder")
            assert writer.ident is not None
            return step, time.clock_gettime(time.pthread_getcpuclockid(writer.ident)) / steps

    def hooks_block(self, steps: int) -> float:
        """Seconds a step that the training thread spends in the recorder's hooks: the median over means of ten steps.

        The mean of all where few steps are recorded.
        """
        spent = [0.0]

        def timed(function: Callable[..., Any], ends_step: bool) -> Callable[..., Any]:
            def wrapper(*args: Any) -> Any:
                begin = time.perf_counter()
                found = function(*args)
                spent[-1] += time.perf_counter() - begin
                if ends_step:
                    spent.append(0.0)
                return found

            return wrapper

        with ExitStack() as stack:
            hooks = (Steps, "_on_forward"), (Steps, "_before_step"), (Steps, "_after_step"), (LayerWatch, "_on_forward")
            for owner, name in hooks:
                wrapper = timed(getattr(owner, name), name == "_after_step")
                stack.enter_context(patch.object(owner, name, wrapper))
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            stack.enter_context(self._watch(folder))
            self.block(steps)
        tens = [sum(spent[k : k + 10]) / 10 for k in range(0, len(spent) - 10, 10)]
        return statistics.fmean(spent) if self.every == "auto" else statistics.median(tens)

    def _watch(self, folder: str) -> Recorder:
        return bn.watch(self.model, folder, optimizer=self.optimizer, every=self.every)


def measure(training: Training, pairs: int) -> dict[str, float]:
    """Medians over pairs of blocks, in milliseconds and per cent."""
    steps = max(3, round(BLOCK_SECONDS / training.block(5)))
    training.watched_block(steps)
    rows = []
    for k in range(pairs):
        # The order alternates, so that a drift of the machine's speed cancels.
        if k % 2:
            bare, watched = training.block(steps), training.watched_block(steps)
        else:
            watched, bare = training.watched_block(steps), training.block(steps)
        rows.append((bare, watched[0] / bare - 1, watched[1]))
    step, overhead, writer = (statistics.median(column) for column in zip(*rows, strict=True))
    low, _, high = statistics.quantiles([row[1] for row in rows], n=4)
    hooks = training.hooks_block(max(steps, 51))
    return {
        "step": step * 1e3,
        "overhead": overhead * 100,
        "low": low * 100,
        "high": high * 100,
        "hooks": hooks * 1e3,
        "writer": writer * 1e3,
        "share": (hooks + writer) / step * 100,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    lines = [
        *header(
            "What recording costs",
            "Medians over pairs of blocks, watched and unwatched in turns; in brackets the middle half of the pairs.",
        ),
        "| model | layers | every | step, ms | overhead, % | hooks, ms a step | writer, CPU ms a step | share, % |",
        "|---|---|---|---|---|---|---|---|",
    ]
    cases: tuple[tuple[str, Callable[[], tuple[nn.Module, Tensor]], bool, Every], ...] = (
        ("mlp", mlp, False, 1),
        ("mlp", mlp, False, 10),
        ("mlp", mlp, False, "auto"),
        ("mlp", mlp, True, "auto"),
        ("resnet20", resnet20, False, 1),
        ("resnet20", resnet20, True, 1),
    )
    for name, build, ours, every in cases:
        model, x = build()
        found = measure(Training(bn.convert(model) if ours else model, x, every), options.pairs)
        lines.append(
            f"| {name} | {'batchnorm' if ours else 'torch.nn'} | {every} | {found['step']:.2f} "
            f"| {found['overhead']:+.1f} ({found['low']:+.1f} to {found['high']:+.1f}) "
            f"| {found['hooks']:.3f} | {found['writer']:.3f} | {found['share']:.1f} |"
        )
        print(lines[-1], flush=True)
    save("record", lines)


if __name__ == "__main__":
    main()
