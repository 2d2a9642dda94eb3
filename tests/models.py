"""Networks as people write them, small: residual, inverted residual, and some that resist tracing."""

from __future__ import annotations

import torch
from networks import BasicBlock, InvertedResidual
from torch import Tensor, nn


def small_resnet() -> nn.Module:
    """Two blocks, one with a downsampling shortcut."""
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True)),
        *(BasicBlock(8, 8), BasicBlock(8, 16, 2)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)),
    )


def small_mobilenet() -> nn.Module:
    """Three inverted residuals."""
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6()),
        *(InvertedResidual(8, 8, 1, 1), InvertedResidual(8, 12, 2, 6), InvertedResidual(12, 12, 1, 6)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5)),
    )


class Functional(nn.Module):
    """Activations as functions and methods, one with a parameter, and a value used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.ModuleList([nn.BatchNorm1d(6)])
        self.leaky = nn.LeakyReLU(0.3)
        self.a, self.b, self.c = nn.BatchNorm1d(6), nn.BatchNorm1d(6), nn.BatchNorm1d(6)
        self.d, self.e = nn.BatchNorm1d(6), nn.BatchNorm1d(6)

    def forward(self, x: Tensor, extra: Tensor | None = None) -> Tensor:
        h = torch.nn.functional.silu(self.a(x))
        h = self.leaky(self.b(h).add(x))
        h = torch.tanh(x + self.c(h))
        twice = self.d(h)
        h = twice.relu() * twice  # not fusible: used twice
        return self.e(h).sigmoid() * 2
