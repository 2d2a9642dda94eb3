"""The error of a float32 training step against float64: ours and torch's, by the mean of the input and the layout.

    python benchmarks/exact.py

prints a table and writes it to benchmarks/results/exact.md.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from common import header, save
from torch import Tensor

import batchnorm as bn
from batchnorm import reference

SHAPE = (64, 8, 32, 32)


def errors(function: object, x: Tensor) -> tuple[float, float]:
    """Largest |y - y64|, and largest relative error of the variance that goes into running_var."""
    running_mean, running_var = torch.zeros(x.size(1)), torch.ones(x.size(1))
    y = function(x, running_mean, running_var, training=True, momentum=1.0)  # pyright: ignore[reportCallIssue]
    exact = bn.Moments.measure(x).variance(unbiased=True)
    error = (y.double() - reference.forward(x).y).abs().max().item()
    return error, ((running_var.double() - exact) / exact).abs().max().item()


def main() -> None:
    torch.manual_seed(0)
    lines = [
        *header(
            "Exactness",
            f"Inputs N(mu, 1), float32, {SHAPE}; errors against float64 of y, and (relative) of the tracked variance.",
        ),
        "| mu | layout | y, torch | y, ours | variance, torch | variance, ours |",
        "|---|---|---|---|---|---|",
    ]
    for mean in (0.0, 1.0, 1e3, 1e4, 1e5, 1e6):
        for layout in (torch.contiguous_format, torch.channels_last):
            x = (torch.randn(SHAPE) + mean).contiguous(memory_format=layout)
            (y_theirs, v_theirs), (y_ours, v_ours) = errors(F.batch_norm, x), errors(bn.batch_norm, x)
            name = str(layout).removeprefix("torch.").removesuffix("_format")
            lines.append(f"| {mean:g} | {name} | {y_theirs:.1e} | {y_ours:.1e} | {v_theirs:.1e} | {v_ours:.1e} |")
    print("\n".join(lines))
    save("exact", lines)


if __name__ == "__main__":
    main()
