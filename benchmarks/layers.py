"""What the layers' options cost: one layer's step with each option and with none, alternating, in one process.

    python benchmarks/layers.py [--rounds 200]

prints a table and writes it to benchmarks/results/layers.md. In every round each variant takes one step, forward and
backward, in a new order; a ratio is the median, over the rounds, of its step to the plain step of the same round.
Times are CPU time on one thread, which excludes the machine's other work.
"""

from __future__ import annotations

import argparse
import time
import timeit
from collections.abc import Callable
from typing import Any

import torch
from common import header, ratios, save
from torch import Tensor

import batchnorm as bn

SHAPES = {"images": (32, 64, 28, 28), "sequences": (32, 128, 100), "rows": (128, 256)}
LAYERS = {2: bn.BatchNorm1d, 3: bn.BatchNorm1d, 4: bn.BatchNorm2d}
OPTIONS: dict[str, dict[str, Any]] = {
    "center=False, scale=False": {"center": False, "scale": False},
    "unbiased=False": {"unbiased": False},
    'singleton="running"': {"singleton": "running"},
    'nonfinite="skip"': {"nonfinite": "skip"},
    'nonfinite="raise"': {"nonfinite": "raise"},
    "virtual_batch_size=8": {"virtual_batch_size": 8},
    "renorm=Renorm()": {"renorm": bn.Renorm()},
    'activation="relu"': {"activation": "relu"},
}


def variants(shape: tuple[int, ...]) -> dict[str, Callable[[], object]]:
    """A step of each kind."""
    cls, channels = LAYERS[len(shape)], shape[1]
    x, dy = torch.randn(shape).requires_grad_(), torch.randn(shape)

    def step(layer: torch.nn.Module, x: Tensor = x, dy: Tensor = dy, **given: Any) -> Callable[[], object]:
        leaves = [x, *layer.parameters()]
        return lambda: torch.autograd.grad(layer(x, **given), leaves, dy)

    steps = {"plain": step(cls(channels))}
    steps |= {name: step(cls(channels, **options)) for name, options in OPTIONS.items()}
    plain = cls(channels)
    steps["relu after it"] = lambda: torch.autograd.grad(plain(x).relu(), [x, *plain.parameters()], dy)
    if len(shape) > 2:
        values = shape[:1] + shape[2:]
        steps["mask, a quarter False"] = step(cls(channels), mask=torch.rand(values) < 0.75)
        last, dy_last = (t.detach().movedim(1, -1).contiguous() for t in (x, dy))
        last.requires_grad_()
        steps["channel_dim=-1"] = step(cls(channels, channel_dim=-1), last, dy_last)
        steps["transposed before and after"] = lambda: torch.autograd.grad(
            plain(last.movedim(-1, 1).contiguous()).movedim(1, -1).contiguous(), [last, *plain.parameters()], dy_last
        )
    if len(shape) == 3:
        steps["lengths, a quarter short"] = step(cls(channels), lengths=torch.linspace(50, 100, shape[0]).long())
    return steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    options = parser.parse_args()
    torch.set_num_threads(1)
    steps = {name: variants(shape) for name, shape in SHAPES.items()}
    measured = {name: ratios(kinds, options.rounds, time.process_time) for name, kinds in steps.items()}
    plain = {
        name: min(timeit.repeat(kinds["plain"], timer=time.process_time, number=5, repeat=20)) * 2e5
        for name, kinds in steps.items()
    }
    shapes = ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in SHAPES.items())
    taken = ", ".join(f"{name} {microseconds:.0f} µs" for name, microseconds in plain.items())
    note = (
        f"One layer, float32, forward and backward with all gradients: {shapes}. The time of a step beside that of a "
        f"plain step in the same round, in processor time; the plain ones took, at best, {taken}."
    )
    lines = header("What the layers' options cost", note)
    lines += [f"| option | {' | '.join(SHAPES)} |", "|---" * (len(SHAPES) + 1) + "|"]
    names = dict.fromkeys(name for kinds in measured.values() for name in kinds)
    for name in names:
        cells = [f"{kinds[name]:.2f}" if name in kinds else "" for kinds in measured.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    print("\n".join(lines))
    save("layers", lines)


if __name__ == "__main__":
    main()
