"""On torch's own batch-norm operators: for devices that have no kernel of ours, with the options that torch knows.

Autograd sees torch's operators, so their own derivatives serve, and torch.compile fuses them as it does torch.nn's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from .plain import Operands, Settings, statistics_of

_TENSORS = (Tensor, nn.Parameter, nn.Buffer, FakeTensor, FunctionalTensor)
_PASSES_ON = torch._C._disabled_torch_dispatch_impl
_LOW_PRECISION = (torch.bfloat16, torch.float16)


class Measured(NamedTuple):
    """What torch's operators keep of a batch, or of all ranks' batches: per channel, (C,), in float32 at least."""

    values: int | Tensor
    mean: Tensor
    rstd: Tensor
    eps: float

    def statistics(self) -> Tensor:
        """The (3, C) tensor of `plain.Statistics`: made only on request, because it costs as much as a small layer."""
        mean, rstd = self.mean.double(), self.rstd.double()
        count = torch.zeros_like(mean) + self.values
        m2 = (rstd.square().reciprocal() - self.eps).clamp(min=0) * count
        # torch's operators divide by a count of 0.
        return statistics_of(count, torch.where(count > 0, mean, 0.0), torch.where(count > 0, m2, 0.0))


def why_not(operands: Operands, settings: Settings, training: bool) -> str | None:
    """Why torch's operators do not serve the call; None if they do."""
    if operands.mask is not None:
        return "torch's batch norm has no mask"
    if training and settings.virtual_batch:
        return "torch's batch norm has no virtual batches"
    if operands.x.layout is torch.strided and operands.x.numel() == 0:
        return "torch's batch norm cannot measure an empty batch"
    return None


def is_wrapped(x: Tensor) -> bool:
    """Whether x is of a subclass that handles torch's operators itself, as DTensor does."""
    return type(x) not in _TENSORS and getattr(type(x), "__torch_dispatch__", _PASSES_ON) is not _PASSES_ON


def vectors_dtype(x: Tensor) -> torch.dtype:
    """The dtype of weight, bias and running statistics: torch requires one for all of them, x's or float32."""
    return torch.float32 if x.dtype in _LOW_PRECISION else x.dtype


def moves(running_mean: Tensor | None, x: Tensor) -> bool:
    """Whether torch's operators can move these running statistics."""
    if running_mean is None or running_mean.dtype != vectors_dtype(x):
        return False
    # If a DTensor's channels are sharded, torch silently updates a copy.
    return not any(placement.is_shard(1) for placement in getattr(x, "placements", ()))


def scratch(x: Tensor) -> tuple[Tensor, Tensor]:
    """Running statistics that torch updates instead of the layer's; they are never read.

    A recomputation tracks nothing. Without these, autograd would save two tensors fewer than in the first forward,
    which torch.utils.checkpoint refuses; and torch would keep the measured statistics in the dtype of x.
    """
    empty = [x.new_empty((x.size(1),), dtype=vectors_dtype(x), layout=torch.strided) for _ in range(2)]
    return empty[0], empty[1]


def train(
    operands: Operands, settings: Settings, running_mean: Tensor | None, running_var: Tensor | None, momentum: float
) -> tuple[Tensor, Measured]:
    """y, and the measured statistics. Also moves the running statistics, which torch `moves`, unless they are None."""
    if running_mean is None or running_var is None:
        running_mean, running_var = scratch(operands.x)
    z, measured = normalized(operands, settings, running_mean, running_var, momentum)
    return finish(z, operands, settings), measured


def normalized(
    operands: Operands, settings: Settings, running_mean: Tensor, running_var: Tensor, momentum: float
) -> tuple[Tensor, Measured]:
    """The same, before residual and activation. If torch refuses the call, nothing has moved."""
    x, weight, bias = of_one_dtype(operands)
    z, mean, rstd, *_ = torch._batch_norm_impl_index(  # pyright: ignore[reportPrivateImportUsage]
        x, weight, bias, running_mean, running_var, True, momentum, settings.eps, torch.backends.cudnn.enabled
    )
    return z, Measured(x.numel() // max(x.size(1), 1), mean.detach(), rstd.detach(), settings.eps)


def infer(operands: Operands, running_mean: Tensor, running_var: Tensor, settings: Settings) -> Tensor:
    """y by the running statistics."""
    x, weight, bias = of_one_dtype(operands)
    mean, var = (_cast(running, vectors_dtype(x)) for running in (running_mean, running_var))
    z = F.batch_norm(x, mean, var, weight, bias, False, 0.0, settings.eps)
    return finish(z, operands, settings)


def of_one_dtype(operands: Operands) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """x, weight and bias: the running statistics after .half() stay in float32, so all vectors become float32."""
    x, weight, bias, _, _ = operands
    return x, _cast(weight, vectors_dtype(x)), _cast(bias, vectors_dtype(x))


def finish(z: Tensor, operands: Operands, settings: Settings) -> Tensor:
    """activation(z + residual), where no one else uses z."""
    residual = operands.residual
    if residual is None:
        return settings.activation(z)
    # In place, because batch norm differentiates from x and does not keep z. For a DTensor, + may choose other
    # placements.
    return settings.activation(z + residual if is_wrapped(z) else z.add_(residual))


def _cast(vector: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return vector if vector is None or vector.dtype == dtype else vector.to(dtype)
