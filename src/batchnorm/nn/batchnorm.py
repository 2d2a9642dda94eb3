"""BatchNorm1d, BatchNorm2d, BatchNorm3d: torch.nn's layers with our forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from .. import activations
from ..activations import Activation
from ..functional import batch_norm_with_moments
from ..moments import Moments
from ..ops.steps import under_transform


class _BatchNorm(nn.modules.batchnorm._BatchNorm):
    """What the three layers share: when to measure, when to track, and what to remember of it."""

    # Class attributes, so that a torch.nn layer whose class is swapped for one of these has them too.
    activation: Activation = activations.NONE
    _measured: Moments | None = None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: str | nn.Module | type[nn.Module] | None = None,
    ) -> None:
        parsed = activations.parse(activation)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, bias=bias)
        if parsed != activations.NONE:
            self.activation = parsed
        self._keep_statistics_precise({})

    @property
    def gamma(self) -> Tensor | None:
        """The learned scale, (C,): another name of `weight`."""
        return self.weight

    @property
    def beta(self) -> Tensor | None:
        """The learned shift, (C,): another name of `bias`."""
        return self.bias

    @property
    def measured(self) -> Moments | None:
        """Moments of the last batch seen in train mode, eager and outside torch.func's transforms; None before it."""
        return self._measured

    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        activation: str | nn.Module | Activation | None = None,
    ) -> Tensor:
        """y = activation(gamma * (x - mean) / sqrt(var + eps) + beta + residual), 0 where the mask is False.

        Args:
            input: x, of the shape in the class's name: (N, C, *).
            residual: of x's shape and dtype, added before the activation.
            mask: bool, broadcastable to x without its channels: True counts.
            activation: for this call; None for the layer's own.
        """
        if isinstance(input, fx.Proxy):  # torch.fx takes torch.nn's layers whole, and so it shall ours
            return _traced_whole(self, input, residual, mask, activation)
        self._check_input_dim(input)
        # Without running statistics there is nothing but the batch to normalise with, in eval too.
        measures = self.training or (self.running_mean is None and self.running_var is None)
        tracks = self.training and self.track_running_stats
        reads = tracks or not measures
        y, measured = batch_norm_with_moments(
            input,
            self.running_mean if reads else None,
            self.running_var if reads else None,
            self.weight,
            self.bias,
            measures,
            self._next_momentum() if tracks else 0.0,
            self.eps,
            residual=residual,
            activation=self.activation if activation is None else activations.parse(activation),
            mask=mask,
        )
        # After the fact, so that an input that raises leaves the count as it was.
        if tracks and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        if self.training and not (torch.compiler.is_compiling() or under_transform()):
            self.__dict__["_measured"] = measured  # a plain attribute: Module's own assignment costs a microsecond
        return y

    def _next_momentum(self) -> float | Tensor:
        if self.momentum is not None:
            return self.momentum
        # Cumulative average. On the device: reading the count would wait for it, and break a compiled graph.
        return 0.0 if self.num_batches_tracked is None else 1.0 / (self.num_batches_tracked + 1).double()

    def extra_repr(self) -> str:
        """torch.nn's, and what this layer has beyond it."""
        fused = "" if self.activation == activations.NONE else f", activation={self.activation.name}"
        return super().extra_repr() + fused

    def _apply(self, fn: Any, recurse: bool = True) -> _BatchNorm:
        """Cast and move as any module, but keep the running statistics in float32 at least.

        In bfloat16 an update of momentum * (measured - tracked) is soon below half an ulp, and the average stalls.
        """
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        self._keep_statistics_precise(before)
        return self

    def _keep_statistics_precise(self, before: dict[str, Tensor]) -> None:
        for name in ("running_mean", "running_var"):
            buffer = self._buffers[name]
            if buffer is not None and buffer.dtype in (torch.bfloat16, torch.float16):
                precise = before.get(name, buffer)
                self._buffers[name] = precise.to(buffer.device, torch.promote_types(precise.dtype, torch.float32))

    def __getstate__(self) -> dict[str, Any]:
        # The last measurement belongs to the training under way, not to a pickled or copied layer.
        return {name: value for name, value in self.__dict__.items() if name != "_measured"}


def _traced_whole(layer: nn.Module, input: fx.Proxy, residual: Any, mask: Any, activation: Any) -> Any:
    given = {"residual": residual, "mask": mask, "activation": activation}
    given = {name: value for name, value in given.items() if value is not None}
    tracer = input.tracer
    assert isinstance(tracer, fx.Tracer)
    return tracer.create_proxy("call_module", tracer.path_of_module(layer), (input,), given)


class BatchNorm1d(_BatchNorm, nn.BatchNorm1d):
    """Batch normalization of (N, C) or (N, C, L): a drop-in for torch.nn.BatchNorm1d.

        y = gamma * (x - mean(batch)) / sqrt(var(batch) + eps) + beta

    mean and var are measured on every batch and replaced by the next; running_mean and running_var track them for eval;
    gamma and beta (`weight` and `bias`) are parameters like any other, shared by all batches, moved by the optimizer.

    Args:
        num_features: C.
        eps: added to the variance, in units of x squared.
        momentum: share of the new in the running statistics; None for the average over all batches.
        affine: learn gamma and beta; else 1 and 0.
        track_running_stats: keep running statistics; else measure in eval too.
        device, dtype: of parameters and buffers.
        bias: with affine, learn beta; else gamma alone.
        activation: fused after it, as in `batch_norm`: None, a name such as "relu", or the torch.nn module of it.

    Raises:
        ValueError: the input has another number of dimensions; one value per channel in training; unknown activation.

    Source: Ioffe & Szegedy 2015. Parameters, buffers, state_dict and defaults are torch.nn's.

    Example:
        >>> layer = BatchNorm1d(3, activation="relu")
        >>> layer(torch.randn(8, 3)).shape, layer.gamma.shape, int(layer.num_batches_tracked)
        (torch.Size([8, 3]), torch.Size([3]), 1)
    """


class BatchNorm2d(_BatchNorm, nn.BatchNorm2d):
    """Batch normalization of (N, C, H, W): a drop-in for torch.nn.BatchNorm2d. Arguments as of `BatchNorm1d`.

    Example:
        >>> BatchNorm2d(3)
        BatchNorm2d(3, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True)
    """


class BatchNorm3d(_BatchNorm, nn.BatchNorm3d):
    """Batch normalization of (N, C, D, H, W): a drop-in for torch.nn.BatchNorm3d. Arguments as of `BatchNorm1d`.

    Example:
        >>> BatchNorm3d(2)(torch.randn(2, 2, 3, 3, 3)).shape
        torch.Size([2, 2, 3, 3, 3])
    """
