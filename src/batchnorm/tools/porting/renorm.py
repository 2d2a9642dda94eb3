"""Batch renormalization as Keras does it, which averages other things than ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...mixin import Mixin, mix_in
from ...nn import BatchNorm1d, BatchNorm2d, BatchNorm3d

AVERAGES = ("moving_stddev", "renorm_mean", "renorm_stddev")


class KerasRenorm(Mixin):
    """A layer that renormalizes with averages of its own, with their own decay, and averages standard deviations.

    stddev = sqrt(var + eps); the running variance is the square of the averaged stddev, less eps.
    """

    moving_stddev: Tensor
    renorm_mean: Tensor
    renorm_stddev: Tensor
    renorm_decay: float

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """In training, the layer's own forward with the other averages in place of its running statistics."""
        layer: Any = self
        if not layer.training:
            return super().forward(input, *args, **kwargs)
        if torch.compiler.is_compiling():
            raise NotImplementedError("Keras's renormalization is trained eagerly: its averages are not in the graph")
        kept = layer.running_mean, layer.running_var, layer.track_running_stats
        variance = (self.renorm_stddev.square() - layer.eps).clamp(min=0)
        layer.running_mean, layer.running_var, layer.track_running_stats = self.renorm_mean, variance, False
        try:
            y = super().forward(input, *args, **kwargs)
        finally:
            layer.running_mean, layer.running_var, layer.track_running_stats = kept
        if layer.track_running_stats:
            self._track()
        return y

    @torch.no_grad()
    def _track(self) -> None:
        layer: Any = self
        stddev = (layer.measured.variance() + layer.eps).sqrt()
        for average, value, momentum in (
            (self.renorm_mean, layer.measured.mean, 1 - self.renorm_decay),
            (self.renorm_stddev, stddev, 1 - self.renorm_decay),
            (layer.running_mean, layer.measured.mean, layer.momentum),
            (self.moving_stddev, stddev, layer.momentum),
        ):
            average.lerp_(value.to(average.dtype), momentum)
        layer.running_var.copy_((self.moving_stddev.square() - layer.eps).clamp(min=0))
        layer.num_batches_tracked.add_(1)


def renormalize_as_keras(
    layer: BatchNorm1d | BatchNorm2d | BatchNorm3d, averages: Mapping[str, Tensor], decay: float
) -> None:
    """Let the layer, which has a `renorm` for the limits, renormalize with these averages."""
    mix_in(layer, KerasRenorm)
    assert isinstance(layer, KerasRenorm)
    for name in AVERAGES:
        layer.register_buffer(name, averages[name].clone())
    layer.renorm_decay = decay
