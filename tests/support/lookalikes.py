"""Batch norms of other libraries, written after what their documentation says they compute, under their names."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BatchNormAct2d(nn.BatchNorm2d):
    """timm's: batch norm, drop and activation in one module, without `super().forward`."""

    def __init__(self, channels: int, act: nn.Module | None = None, drop: nn.Module | None = None) -> None:
        super().__init__(channels)
        self.drop = nn.Identity() if drop is None else drop
        self.act = nn.ReLU(inplace=True) if act is None else act

    def forward(self, x: Tensor) -> Tensor:
        """As timm's, whose own update of the counter is torch's."""
        tracks = self.training and self.track_running_stats
        if tracks and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        running = (self.running_mean, self.running_var) if tracks or not self.training else (None, None)
        momentum = 0.0 if self.momentum is None else self.momentum
        y = F.batch_norm(x, *running, self.weight, self.bias, self.training, momentum, self.eps)
        return self.act(self.drop(y))


BatchNormAct2d.__module__ = "timm.layers.norm_act"


class FrozenBatchNorm2d(nn.Module):
    """torchvision's, detectron2's and transformers': four buffers."""

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, x: Tensor) -> Tensor:
        """gamma * (x - running_mean) / sqrt(running_var + eps) + beta."""
        w, b, mean, var = (
            getattr(self, name)[:, None, None] for name in ("weight", "bias", "running_mean", "running_var")
        )
        return (x - mean) * (w * (var + self.eps).rsqrt()) + b
