"""What our layers share: when to measure, when to track, and what to remember of it."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from .. import activations
from ..activations import Activation
from ..checks import LonelyValues, NonfiniteStatistics, lonely_values
from ..mixin import BatchNorm, class_of_copies, is_parametrized
from ..moments import Moments, mask_of_lengths
from ..ops import at_once, choose
from ..ops.collective import RanksDiffer, several
from ..pipeline import (
    Operands,
    Running,
    Settings,
    Statistics,
    Tracking,
    moments_of,
    normalize_batch,
    under_transform,
)
from .channels import channels_back, channels_second, dimension_of_channels
from .frozen import freeze_as_saved
from .naming import name_of
from .options import Options, beyond_torch, put_options
from .recompute import recomputing
from .replaced import Irreplaceable
from .usual import usual_call
from .usual_native import usual_native_call


class BatchNormLayer(Irreplaceable, nn.modules.batchnorm._BatchNorm):
    """What the layers share: when to measure, when to track, and what to remember of it.

    Its own names begin with `_batchnorm_`, for it also stands in for torch.nn's layers under subclasses of them, whose
    attributes and methods may be called anything.
    """

    # Class attributes, so that a torch.nn layer whose class is swapped for one of these has them too.
    _batchnorm_options: Options = Options()
    _batchnorm_measured: Statistics | Moments | None = None  # the statistics of the last batch measured in train mode
    _batchnorm_skipped: Tensor | None = None  # how many batches had something that was not finite

    @property
    def _batchnorm_moments(self) -> Moments | None:
        measured = self._batchnorm_measured
        if measured is None or isinstance(measured, Moments):
            return measured
        moments = self.__dict__["_batchnorm_measured"] = moments_of(measured)  # one step in many is asked for
        return moments

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
            lengths: integers, (N,), from 0 to L, in place of a mask: the first `lengths` values of each sequence, (N,
                C, L) or (N, L, C), count. With a mask too, values count that both select.
            activation: for this call; None for the layer's own.
        """
        options = self._batchnorm_options
        act = options.activation if activation is None else activations.parse(activation)
        if at_once.possible(input) and options.usual and lengths is None:
            self._check_input_dim(input)
            y = usual_call(self, input, residual, mask, act, options)
            if y is not None:
                return y
        elif options.usual and mask is None and lengths is None and choose.native_at_once(input):
            self._check_input_dim(input)
            y = usual_native_call(self, input, residual, act, options)
            if y is not None:
                return y
        if isinstance(input, fx.Proxy):  # torch.fx takes torch.nn's layers whole, and so it shall ours
            return _traced_whole(self, input, residual=residual, mask=mask, lengths=lengths, activation=activation)
        self._check_input_dim(input)
        dim = 1 if options.channel_dim == 1 else dimension_of_channels(input, options.channel_dim, self.num_features)
        if lengths is not None:
            mask = mask_of_lengths(lengths, input, dim, mask)
        operands, size = Operands(input, self.weight, self.bias, residual, mask), options.virtual_batch_size or 0
        if dim != 1:
            operands, size = channels_second(operands, dim, size)
        settings = Settings(self.eps, act, size)
        running = Running(self.running_mean, self.running_var)

        # Without running statistics there is nothing but the batch to normalize with, in eval too.
        measures = self.training or (running.mean is None and running.var is None)
        again = self.training and recomputing()  # the batch was tracked the first time
        if again and options.renorm is not None:
            raise NotImplementedError(
                "batch renormalization reads the running statistics, which have moved since the forward that is being "
                "recomputed, so the gradients would be wrong. Keep this layer out of the activation checkpoint"
            )
        tracks = self.training and self.track_running_stats and not again
        ranks = several(options.process_group) if options.sync and self.training else None
        renorm = options.renorm if measures else None
        try:
            y, statistics = normalize_batch(
                operands,
                Running(None, None) if measures and not tracks and renorm is None else running,
                settings,
                measures,
                Tracking(next_momentum(self), options.unbiased, options.nonfinite) if tracks else None,
                ranks,
                None if renorm is None else renorm.limits(self.num_batches_tracked),
            )
        except (NonfiniteStatistics, RanksDiffer) as error:
            raise type(error)(f"{name_of(self) or 'batch norm'}: {error}") from None
        except LonelyValues:
            if options.singleton == "raise" or running.mean is None:
                raise lonely_values(input, name_of(self), options.virtual_batch_size or 0) from None
            tracks = False
            y, statistics = normalize_batch(operands, running, settings, False, None)
        # After the fact, so that an input that raises leaves the count as it was.
        if tracks and (batches := self.num_batches_tracked) is not None:
            batches.add_(1)
        if self.training and statistics is not None and not again and not under_transform():
            self._batchnorm_remember(statistics, tracks)
        return y if dim == 1 else channels_back(y, input, dim)

    def _batchnorm_remember(self, statistics: Statistics, tracked: bool) -> None:
        """What a train-mode call measured, for `measured` and `skipped`."""
        if tracked and self._batchnorm_options.nonfinite == "skip":
            self._batchnorm_count_broken(statistics)
        if not torch.compiler.is_compiling():
            self.__dict__["_batchnorm_measured"] = statistics  # Module's own assignment costs a microsecond

    def _batchnorm_count_broken(self, statistics: Statistics) -> None:
        """Count the batch if any channel's statistics are not finite."""
        values = statistics if isinstance(statistics, Tensor) else statistics.statistics()
        broken = (~values.isfinite().all()).long()
        if self._batchnorm_skipped is None:
            self._batchnorm_skipped = torch.zeros_like(broken)
        self._batchnorm_skipped.add_(broken)  # in place, so that a captured CUDA graph counts on

    def reset_running_stats(self) -> None:
        """Set the running statistics to 0 and 1, or as the layer's initializers say, and the counts to 0."""
        super().reset_running_stats()
        self.__dict__.pop("_batchnorm_skipped", None)
        _initialize(self, "running_mean", "running_var")

    def reset_parameters(self) -> None:
        """Set everything as in a new layer: running statistics, gamma and beta."""
        self.reset_running_stats()
        for parameter, value in ((self.weight, 1.0), (self.bias, 0.0)):
            if parameter is not None:
                nn.init.constant_(parameter, value)
        _initialize(self, "weight", "bias")

    def extra_repr(self) -> str:
        """torch.nn's, and what this layer has beyond it."""
        said = super().extra_repr()
        if self.affine and self.weight is None:
            said += ", scale=False"
        said += "".join(f", {name}={value}" for name, value in beyond_torch(self).items())
        return said + (f", skipped={skipped_by(self)}" if self._batchnorm_options.nonfinite == "skip" else "")

    def _apply(self, fn: Any, recurse: bool = True) -> BatchNormLayer:
        """Cast and move as any module, but keep the running statistics in float32 at least.

        In bfloat16 an update of momentum * (measured - tracked) is soon below half an ulp, and the average stalls.
        """
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        keep_statistics_precise(self, before)
        return self

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, *rest: Any, **named: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest, **named)
        keep_statistics_precise(self, {})  # assign=True takes the loaded tensors, of their dtype
        freeze_as_saved(self, local_metadata)

    def __deepcopy__(self, memo: dict[int, Any]) -> BatchNormLayer:
        if is_parametrized(self):  # which refuses to be pickled, and takes __getstate__ for that
            cls, state = class_of_copies(self), _state_to_copy(self)
            copied = memo[id(self)] = cls.__new__(cls)  # pyright: ignore[reportAssignmentType]
        else:
            create, arguments, state, *_ = self.__reduce_ex__(4)
            copied = memo[id(self)] = create(*arguments)  # pyright: ignore[reportCallIssue]
        copied.__setstate__(copy.deepcopy(state, memo))
        # Not a thing to copy, and good for the copy too.
        if self._batchnorm_options.process_group is not None:
            put_options(copied, process_group=self._batchnorm_options.process_group)
        return copied  # pyright: ignore[reportReturnType]

    def __getstate__(self) -> dict[str, Any]:
        return _state_to_copy(self)


def _state_to_copy(layer: BatchNormLayer) -> dict[str, Any]:
    """The layer's attributes, without those that belong where it is.

    The last measurement belongs to the training under way, not to a pickled or copied layer; a process group to the
    processes that made it.
    """
    state = {name: value for name, value in layer.__dict__.items() if name != "_batchnorm_measured"}
    if "_batchnorm_options" in state:
        state["_batchnorm_options"] = replace(state["_batchnorm_options"], process_group=None)
    if "process_group" in state.get("_batchnorm_before", {}):
        state["_batchnorm_before"] = {**state["_batchnorm_before"], "process_group": None}
    return state


def next_momentum(layer: BatchNorm) -> float | Tensor:
    """How much of the next batch enters the layer's running statistics."""
    if layer.momentum is not None:
        return layer.momentum
    # Cumulative average. On the device: reading the count would wait for it, and break a compiled graph.
    return 0.0 if layer.num_batches_tracked is None else 1.0 / (layer.num_batches_tracked + 1).double()


def skipped_by(layer: BatchNormLayer) -> int:
    """How many batches had a channel that nonfinite="skip" kept out of the running statistics. Waits for a GPU."""
    return 0 if layer._batchnorm_skipped is None else int(layer._batchnorm_skipped)


@torch.no_grad()
def _initialize(layer: BatchNormLayer, *names: str) -> None:
    for name in names:
        tensor, initializer = getattr(layer, name), layer._batchnorm_options.initializers.get(name)
        if tensor is not None and initializer is not None:
            initializer(tensor) if callable(initializer) else tensor.fill_(initializer)


def keep_statistics_precise(layer: nn.Module, before: dict[str, Tensor]) -> None:
    """Keep running statistics in float32 at least, from what they were `before` they were cast."""
    for name in ("running_mean", "running_var"):
        buffer = layer._buffers[name]
        if buffer is not None and buffer.dtype in (torch.bfloat16, torch.float16):
            precise = before.get(name, buffer)
            layer._buffers[name] = precise.to(buffer.device, torch.promote_types(precise.dtype, torch.float32))


def _traced_whole(layer: nn.Module, input: fx.Proxy, **given: Any) -> Any:
    tracer = input.tracer
    assert isinstance(tracer, fx.Tracer)
    given = {name: value for name, value in given.items() if value is not None}
    return tracer.create_proxy("call_module", tracer.path_of_module(layer), (input,), given)
