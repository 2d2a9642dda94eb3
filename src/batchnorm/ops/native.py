"""On torch's own batch-norm operators: for devices that have no kernel of ours, with the options that torch knows.

Autograd sees torch's operators, so their own derivatives serve, and torch.compile fuses them as it does torch.nn's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .plain import Operands, Settings, statistics_of


class Measured(NamedTuple):
    """What torch's operator keeps of a batch: per channel, (C,), in float32 at least."""

    values: int
    mean: Tensor
    rstd: Tensor
    eps: float

    def statistics(self) -> Tensor:
        """The (3, C) tensor of `plain.Statistics`: made when somebody asks, for it costs as much as a small layer."""
        mean, rstd = self.mean.double(), self.rstd.double()
        count = torch.full_like(mean, self.values)
        return statistics_of(count, mean, (rstd.square().reciprocal() - self.eps).clamp(min=0) * count)


def why_not(operands: Operands, settings: Settings, training: bool) -> str | None:
    """Why torch's operators do not serve the call; None if they do."""
    if operands.mask is not None:
        return "torch's batch norm has no mask"
    if training and settings.virtual_batch:
        return "torch's batch norm has no virtual batches"
    if operands.x.layout is torch.strided and operands.x.numel() == 0:
        return "torch's batch norm cannot measure an empty batch"
    return None


def train(
    operands: Operands, settings: Settings, running_mean: Tensor | None, running_var: Tensor | None, momentum: float
) -> tuple[Tensor, Measured]:
    """y, and what of x it was normalized with; the running statistics moved."""
    x, weight, bias = _of_one_dtype(operands, running_mean)
    z, mean, rstd, *_ = torch._batch_norm_impl_index(  # pyright: ignore[reportPrivateImportUsage]
        x, weight, bias, running_mean, running_var, True, momentum, settings.eps, torch.backends.cudnn.enabled
    )
    measured = Measured(x.numel() // max(x.size(1), 1), mean.detach(), rstd.detach(), settings.eps)
    return _finish(z, operands, settings), measured


def infer(operands: Operands, running_mean: Tensor, running_var: Tensor, settings: Settings) -> Tensor:
    """y by the running statistics."""
    x, weight, bias = _of_one_dtype(operands, running_mean)
    z = F.batch_norm(x, running_mean, running_var, weight, bias, False, 0.0, settings.eps)
    return _finish(z, operands, settings)


def _of_one_dtype(operands: Operands, running_mean: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """x, weight and bias. torch wants one dtype for all vectors, and our running statistics stay in float32."""
    x, weight, bias, _, _ = operands
    if running_mean is not None:
        weight, bias = _cast(weight, running_mean.dtype), _cast(bias, running_mean.dtype)
    return x, weight, bias


def _cast(vector: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return vector if vector is None or vector.dtype == dtype else vector.to(dtype)


def _finish(z: Tensor, operands: Operands, settings: Settings) -> Tensor:
    # In place, for nobody keeps z: its batch norm differentiates from x.
    return settings.activation(z if operands.residual is None else z.add_(operands.residual))
