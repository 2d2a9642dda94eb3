"""What our layers share: when to measure, when to track, and what to remember of it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, fx, nn

from .. import activations
from ..activations import Activation
from ..checks import LonelyValues, NonfiniteStatistics, lonely_values
from ..moments import Moments, mask_of_lengths
from ..ops.collective import several
from ..pipeline import (
    Nonfinite,
    Operands,
    Running,
    Settings,
    Tracking,
    moments_of,
    normalize_batch,
    under_transform,
)
from .channels import channels_back, channels_second, dimension_of_channels
from .frozen import freeze_as_saved
from .naming import name_of
from .options import OPTIONS, Initializer, beyond_torch, check_initializers, check_options, momentum_of, options_of
from .recompute import recomputing
from .renorm import Renorm

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class _BatchNorm(nn.modules.batchnorm._BatchNorm):
    """What the layers share: when to measure, when to track, and what to remember of it."""

    # Class attributes, so that a torch.nn layer whose class is swapped for one of these has them too.
    activation: Activation = activations.NONE
    virtual_batch_size: int | None = None
    renorm: Renorm | None = None
    sync: bool = False
    process_group: ProcessGroup | None = None
    nonfinite: Nonfinite = "propagate"
    singleton: Literal["raise", "running"] = "raise"
    channel_dim: int = 1
    unbiased: bool = True
    initializers: Mapping[str, Initializer] = {}
    _measured: Tensor | Moments | None = None  # the statistics of the last batch measured in train mode
    _skipped: Tensor | None = None  # how many batches had something that was not finite

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
        virtual_batch_size: int | None = None,
        renorm: Renorm | None = None,
        sync: bool = False,
        process_group: ProcessGroup | None = None,
        nonfinite: Nonfinite = "propagate",
        singleton: Literal["raise", "running"] = "raise",
        channel_dim: int = 1,
        center: bool = True,
        scale: bool = True,
        decay: float | None = None,
        unbiased: bool = True,
        initializers: Mapping[str, Initializer] | None = None,
    ) -> None:
        given = {
            "activation": activation,
            "virtual_batch_size": virtual_batch_size,
            "renorm": renorm,
            "sync": sync,
            "process_group": process_group,
            "nonfinite": nonfinite,
            "singleton": singleton,
            "channel_dim": channel_dim,
            "unbiased": unbiased,
            "initializers": check_initializers(initializers or {}),
        }
        options = check_options(given, track_running_stats)
        momentum = momentum_of(momentum, decay)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        if not scale:
            self.weight = None
        if not (bias and center):  # torch 2.10 does not take it
            self.bias = None
        self.__dict__.update((name, value) for name, value in options.items() if value != getattr(type(self), name))
        self._keep_statistics_precise({})
        if initializers:
            self.reset_parameters()

    @property
    def gamma(self) -> Tensor | None:
        """The learned scale, (C,): another name of `weight`."""
        return self.weight

    @property
    def beta(self) -> Tensor | None:
        """The learned shift, (C,): another name of `bias`."""
        return self.bias

    @property
    def beyond_torch(self) -> dict[str, Any]:
        """The options in use that torch.nn's layer does not have."""
        return beyond_torch(self)

    @property
    def measured(self) -> Moments | None:
        """Moments of the last batch seen in train mode, eager and outside torch.func's transforms; None before it."""
        if isinstance(self._measured, Tensor):  # one step in many is asked for
            self.__dict__["_measured"] = moments_of(self._measured)
        return self._measured  # pyright: ignore[reportReturnType]

    @property
    def skipped(self) -> int:
        """How many batches had a channel that nonfinite="skip" kept out of the running statistics. Waits for a GPU."""
        return 0 if self._skipped is None else int(self._skipped)

    def __setattr__(self, name: str, value: Any) -> None:
        # An option set later is held to what the constructor asks. Module's own would register an activation's module.
        if name in OPTIONS:
            value = check_options({**options_of(self), name: value}, self.running_mean is not None)[name]
        super().__setattr__(name, value)  # pyright: ignore[reportArgumentType]

    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        activation: str | nn.Module | Activation | None = None,
    ) -> Tensor:
        """y = activation(gamma * (x - mean) / sqrt(var + eps) + beta + residual), 0 where the mask is False.

        Args:
            input: x, of the shape in the class's name: (N, C, *).
            residual: of x's shape and dtype, added before the activation.
            mask: bool, broadcastable to x without its channels: True counts. What is False has no part in the
                statistics, is 0 in y and has no gradient.
            lengths: integers, (N,), from 0 to L, in place of a mask: of each sequence, (N, C, L) or (N, L, C), the
                first so many values count. Beside a mask, what both say counts.
            activation: for this call; None for the layer's own.
        """
        if isinstance(input, fx.Proxy):  # torch.fx takes torch.nn's layers whole, and so it shall ours
            return _traced_whole(self, input, residual=residual, mask=mask, lengths=lengths, activation=activation)
        self._check_input_dim(input)
        dim = 1 if self.channel_dim == 1 else dimension_of_channels(input, self.channel_dim, self.num_features)
        if lengths is not None:
            mask = mask_of_lengths(lengths, input, dim, mask)
        operands, size = Operands(input, self.weight, self.bias, residual, mask), self.virtual_batch_size or 0
        if dim != 1:
            operands, size = channels_second(operands, dim, size)
        settings = Settings(self.eps, self.activation if activation is None else activations.parse(activation), size)
        running = Running(self.running_mean, self.running_var)

        # Without running statistics there is nothing but the batch to normalise with, in eval too.
        measures = self.training or (running.mean is None and running.var is None)
        again = self.training and recomputing()  # the batch was tracked the first time
        if again and self.renorm is not None:
            raise NotImplementedError(
                "batch renormalization reads running statistics, and they have moved since the forward that is being "
                "recomputed: the gradients would be others. Keep this layer out of the activation checkpoint"
            )
        tracks = self.training and self.track_running_stats and not again
        ranks = several(self.process_group) if self.sync and self.training else None
        renorm = self.renorm if measures else None
        try:
            y, statistics = normalize_batch(
                operands,
                Running(None, None) if measures and not tracks and renorm is None else running,
                settings,
                measures,
                Tracking(self._next_momentum(), self.unbiased, self.nonfinite) if tracks else None,
                ranks,
                None if renorm is None else renorm.limits(self.num_batches_tracked),
            )
        except NonfiniteStatistics as error:
            raise NonfiniteStatistics(f"{name_of(self) or 'batch norm'}: {error}") from None
        except LonelyValues:
            if self.singleton == "raise" or running.mean is None:
                raise lonely_values(input, name_of(self), self.virtual_batch_size or 0) from None
            tracks = False
            y, statistics = normalize_batch(operands, running, settings, False, None)
        # After the fact, so that an input that raises leaves the count as it was.
        if tracks and (batches := self.num_batches_tracked) is not None:
            batches.add_(1)
        if self.training and statistics is not None and not again:
            self._remember(statistics, tracks)
        return y if dim == 1 else channels_back(y, input, dim)

    def _remember(self, statistics: Tensor, tracked: bool) -> None:
        """What a train-mode call measured, for `measured` and `skipped`."""
        if under_transform():
            return
        if tracked and self.nonfinite == "skip":
            broken = (~statistics.isfinite().all()).long()
            self._skipped = broken if self._skipped is None else self._skipped + broken
        if not torch.compiler.is_compiling():
            self.__dict__["_measured"] = statistics  # Module's own assignment costs a microsecond

    def _next_momentum(self) -> float | Tensor:
        if self.momentum is not None:
            return self.momentum
        # Cumulative average. On the device: reading the count would wait for it, and break a compiled graph.
        return 0.0 if self.num_batches_tracked is None else 1.0 / (self.num_batches_tracked + 1).double()

    def reset_running_stats(self) -> None:
        """Set the running statistics to 0 and 1, or as the layer's initializers say, and the counts to 0."""
        super().reset_running_stats()
        self.__dict__.pop("_skipped", None)
        self._initialize("running_mean", "running_var")

    def reset_parameters(self) -> None:
        """Set everything as in a new layer: running statistics, gamma and beta."""
        self.reset_running_stats()
        for parameter, value in ((self.weight, 1.0), (self.bias, 0.0)):
            if parameter is not None:
                nn.init.constant_(parameter, value)
        self._initialize("weight", "bias")

    @torch.no_grad()
    def _initialize(self, *names: str) -> None:
        for name in names:
            tensor, initializer = getattr(self, name), self.initializers.get(name)
            if tensor is not None and initializer is not None:
                initializer(tensor) if callable(initializer) else tensor.fill_(initializer)

    def extra_repr(self) -> str:
        """torch.nn's, and what this layer has beyond it."""
        said = super().extra_repr()
        if self.affine and self.weight is None:
            said += ", scale=False"
        said += "".join(f", {name}={value}" for name, value in self.beyond_torch.items())
        return said + (f", skipped={self.skipped}" if self.nonfinite == "skip" else "")

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

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, *rest: Any, **named: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest, **named)
        self._keep_statistics_precise({})  # assign=True takes the loaded tensors, of their dtype
        freeze_as_saved(self, local_metadata)

    def __deepcopy__(self, memo: dict[int, Any]) -> _BatchNorm:
        create, arguments, state, *_ = self.__reduce_ex__(4)
        copied = memo[id(self)] = create(*arguments)  # pyright: ignore[reportCallIssue]
        copied.__setstate__(copy.deepcopy(state, memo))
        if "process_group" in self.__dict__:  # not a thing to copy, and good for the copy too
            copied.process_group = self.process_group
        return copied

    def __getstate__(self) -> dict[str, Any]:
        # The last measurement belongs to the training under way, not to a pickled or copied layer; a process group to
        # the processes that made it.
        left_out = ("_measured", "process_group")
        state = {name: value for name, value in self.__dict__.items() if name not in left_out}
        if "process_group" in state.get("_before_convert", {}):
            state["_before_convert"] = {**state["_before_convert"], "process_group": {}}
        return state


def _traced_whole(layer: nn.Module, input: fx.Proxy, **given: Any) -> Any:
    tracer = input.tracer
    assert isinstance(tracer, fx.Tracer)
    given = {name: value for name, value in given.items() if value is not None}
    return tracer.create_proxy("call_module", tracer.path_of_module(layer), (input,), given)
