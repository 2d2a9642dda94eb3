"""Small batches (tables, reinforcement learning, MLPs), where the overhead of a call exceeds its arithmetic.

    python benchmarks/small.py [--rounds 300]

prints a table and writes it to benchmarks/results/small.md. In every round each layer takes some calls, torch's and
ours in turns, in one process; a ratio is torch's time over ours, the median over the rounds: above 1, ours is faster.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
from common import header, save
from torch import nn

import batchnorm as bn
from batchnorm.bench.timing import interleave

SHAPES = [(4, 32, 4, 4), (32, 64), (128, 100), (256, 512), (64, 16, 8, 8)]
CALLS = 20  # a round
Step = Callable[[], object]


def mlp(layer: type[nn.Module], inputs: int = 64, width: int = 100) -> nn.Sequential:
    """Two hidden layers, each with batch norm and ReLU."""
    torch.manual_seed(0)
    hidden = [nn.Linear(inputs, width), layer(width), nn.ReLU(), nn.Linear(width, width), layer(width), nn.ReLU()]
    return nn.Sequential(*hidden, nn.Linear(width, 10))


def training_step(model: nn.Module, batch: int) -> Step:
    """Forward, backward and the optimizer's step on one batch of a table."""
    torch.manual_seed(1)
    x, labels = torch.randn(batch, 64), torch.randint(10, (batch,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()

    return step


def with_gradients(call: Callable[[torch.Tensor], torch.Tensor], layer: nn.Module, shape: tuple[int, ...]) -> Step:
    """Forward and backward, as training does them: gradients accumulate where there are none."""
    x, dy = torch.randn(shape, requires_grad=True), torch.randn(shape)
    leaves = [x, *layer.parameters()]

    def step() -> None:
        call(x).backward(dy)
        for leaf in leaves:
            leaf.grad = None

    return step


def without_gradients(call: Callable[[torch.Tensor], torch.Tensor], shape: tuple[int, ...]) -> Step:
    """Forward alone."""
    x = torch.randn(shape)

    def step() -> None:
        with torch.no_grad():
            call(x)

    return step


def pairs(shape: tuple[int, ...]) -> dict[str, tuple[Step, Step]]:
    """torch's step and ours, of each kind of call."""
    dims, channels = (1 if len(shape) == 2 else 2), shape[1]
    theirs, ours = getattr(nn, f"BatchNorm{dims}d"), getattr(bn, f"BatchNorm{dims}d")
    relu = nn.ReLU()

    def both(make: Callable[..., Step], with_relu: bool, train: bool) -> tuple[Step, Step]:
        a = theirs(channels).train(train)
        b = (ours(channels, activation="relu") if with_relu else ours(channels)).train(train)
        first = (lambda x: relu(a(x))) if with_relu else a
        return (make(first, a), make(b, b))

    def grads(call: Callable[[torch.Tensor], torch.Tensor], layer: nn.Module) -> Step:
        return with_gradients(call, layer, shape)

    def plain(call: Callable[[torch.Tensor], torch.Tensor], layer: nn.Module) -> Step:
        return without_gradients(call, shape)

    return {
        "forward": both(plain, False, True),
        "forward + backward": both(grads, False, True),
        "BN+ReLU forward + backward": both(grads, True, True),
        "eval": both(plain, False, False),
        "eval BN+ReLU": both(plain, True, False),
    }


def ratio(pair: tuple[Step, Step], rounds: int) -> str:
    """The ratio, and our time of a call in microseconds."""

    def several(step: Step) -> Step:
        def run() -> None:
            for _ in range(CALLS):
                step()

        return run

    seconds = interleave({"torch": several(pair[0]), "ours": several(pair[1])}, (rounds, rounds))
    found = statistics.median(a / b for a, b in zip(seconds["torch"], seconds["ours"], strict=True))
    return f"{found:.2f} ({statistics.median(seconds['ours']) / CALLS * 1e6:.0f} µs)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=300)
    rounds = parser.parse_args().rounds
    tables: list[str] = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found = {shape: {kind: ratio(pair, rounds) for kind, pair in pairs(shape).items()} for shape in SHAPES}
        kinds = list(found[SHAPES[0]])
        tables += [f"## {threads} thread{'s' * (threads > 1)}", "", f"| shape | {' | '.join(kinds)} |"]
        tables += ["|---" * (len(kinds) + 1) + "|"]
        tables += [f"| {shape} | {' | '.join(found[shape].values())} |" for shape in SHAPES]
        tables += ["", "| training step of an MLP, SGD | converted | converted and fused |", "|---|---|---|"]
        for batch in (32, 128):
            torchs = training_step(mlp(nn.BatchNorm1d), batch)
            converted = training_step(bn.convert(mlp(nn.BatchNorm1d)), batch)
            fused = training_step(bn.convert(mlp(nn.BatchNorm1d), fuse=True), batch)
            cells = ratio((torchs, converted), rounds), ratio((torchs, fused), rounds)
            tables.append(f"| batch {batch}, 64 inputs, 2 hidden layers of 100 | {' | '.join(cells)} |")
        tables.append("")
    note = (
        f"float32. A cell is torch's time over ours, the median of {rounds} rounds of {CALLS} calls each, and our time "
        "of a call. Above 1, ours is faster."
    )
    lines = header("Small batches", note) + tables[:-1]
    print("\n".join(lines))
    save("small", lines)


if __name__ == "__main__":
    main()
