"""The hooks on batch-norm layers: what each forward measured, obtained in the cheapest way available."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from ..model.given import UNKNOWN, HandedOver, count_given, moments_given
from ..runs.schema import LayerInfo
from .snapshot import Way

# Nodes that keep the batch mean as result1 and 1 / sqrt(batch variance + eps) as result2.
_NODES = frozenset({"NativeBatchNormBackward0", "CudnnBatchNormBackward0", "MiopenBatchNormBackward0"})
PRECISE = (torch.float32, torch.float64)  # half precision keeps too few digits of a saved or a running statistic


@dataclass(slots=True)
class Moment:
    """What one forward measured: the count a channel, and two (C,) tensors that are what `way` says."""

    way: Way
    count: int | Tensor
    first: Tensor | None = None
    second: Tensor | None = None


NOTHING = Moment(Way.NONE, 0)


class Switch:
    """What the hooks of a recorder look at before they do anything."""

    on = False  # whether the step under way is recorded
    seconds = 0.0  # that the hooks have taken for that
    paused = False  # while probing: no forward is a training step's
    error: Exception | None = None  # that a hook met with


class Hook:
    """A module's hook that compiled code ignores and that copies of the module do not get.

    Args:
        call: what it does, with the arguments of the hook.
    """

    reads_statistics_alone = True  # so that what was fused stays so

    def __init__(self, call: Callable[..., None]) -> None:
        self._call = call

    def __call__(self, *args: Any) -> None:
        if not torch.compiler.is_compiling():
            self._call(*args)

    def __reduce__(self) -> tuple[Callable[[], Any], tuple[()]]:
        # Pickled or copied, it becomes one that does nothing: a copy of a watched model is not watched.
        return _unwatched, ()


class LayerWatch(Hook):
    """The forward hook of one layer: keeps what its forwards measured until the step is recorded."""

    def __init__(self, layer: Any, info: LayerInfo, switch: Switch) -> None:
        super().__init__(self._on_forward)
        self.layer, self.info = layer, info
        self.moments: list[Moment] = []
        self.forwards = 0  # in train mode, within the step under way
        self.untracked = 0  # of them, since the running statistics were last captured
        self.traced_count = UNKNOWN
        self._switch = switch
        self._handed = HandedOver(layer)
        self._inverts = True
        self._version: list[int] = []

    def __call__(self, *args: Any) -> None:
        if torch.compiler.is_compiling():
            # Of a compiled forward the hook leaves this one assignment; the rest is had by inversion.
            layer, given, named, *_ = args
            self.traced_count = count_given(layer, given, named)
        else:
            self._call(*args)

    def _on_forward(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        if not layer.training or self._switch.paused:
            return
        fresh = self._handed.is_fresh(layer)
        self.forwards += 1
        self.untracked += 1
        # Inside a backward it is recomputed (activation checkpointing): the same batch again, counted but not added.
        if self._switch.on and torch._C._current_graph_task_id() == -1:
            begin = perf_counter()
            try:
                self.moments.append(self._moment(layer, args, kwargs, out, fresh))
            except Exception as error:  # handed to the recorder: the forward must not die of it
                self._switch.error = error
            self._switch.seconds += perf_counter() - begin

    def reset(self) -> None:
        """Begin the next step."""
        if self.forwards > 1 and any(moment.way == Way.INVERT for moment in self.moments):
            self._inverts = False  # it runs more than once a step: measure it from now on
        self.moments, self.forwards = [], 0

    def mark(self) -> None:
        """Note where the running statistics are, for `moved`."""
        self._version = self._where_statistics_are()

    def moved(self) -> bool:
        """Whether anything was written into the running statistics since `mark`, by compiled code, say."""
        return self.layer.training and self._where_statistics_are() != self._version

    def _where_statistics_are(self) -> list[int]:
        """Versions of the counter, which torch's layers move by an operator that says so, and of the variance."""
        buffers = (self.layer._buffers.get(name) for name in ("num_batches_tracked", "running_var"))
        return [b._version for b in buffers if b is not None and not b.is_inference()]

    def _moment(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, fresh: bool) -> Moment:
        if fresh:
            return _handed_over(self._handed.moments(layer))
        if self._handed.is_due(layer):
            return NOTHING
        count = count_given(layer, args, kwargs)
        node = getattr(out, "grad_fn", None)
        known = type(node).__name__ in _NODES
        if known and (saved := _saved(node, count)) is not None:
            return saved
        if not known and self._inverts and self.untracked == 1 and torch.is_grad_enabled() and is_tracked(layer):
            return Moment(Way.INVERT, count)
        # The most expensive way, and always available: measure the input.
        moments = moments_given(layer, args, kwargs)
        return Moment(
            Way.VARIANCE, moments.count.max() if count == UNKNOWN else count, moments.mean, moments.variance()
        )


def _unwatched() -> Callable[..., None]:
    return _nothing


def _nothing(*args: Any) -> None:
    """The hook that a copy of a watched layer is left with."""


def _handed_over(moments: Any) -> Moment:
    mean, m2, count = moments.mean.detach(), moments.m2.detach(), moments.count
    if not isinstance(count, Tensor):
        return Moment(Way.M2, int(count), mean, m2)
    if count.numel() > 1:  # a mask of its own for each channel
        return Moment(Way.VARIANCE, count.max(), mean, m2 / count.clamp(min=1))
    return Moment(Way.M2, count, mean, m2)


def _saved(node: Any, count: int) -> Moment | None:
    """What torch's backward will use; None when it holds nothing, too coarse a copy, or only a way to recompute it."""
    if not node._saved_training:
        return None
    # Reading a tensor saved under hooks (checkpointing, offloading) would run them: recompute the forward, say.
    if getattr(node._raw_saved_result1, "unpack_hook", node) is not None:
        return None
    mean, rstd = node._saved_result1, node._saved_result2
    return Moment(Way.RSTD, count, mean, rstd) if rstd.dtype in PRECISE else None


def is_tracked(layer: Any) -> bool:
    """Whether the running statistics say what the batch's were."""
    running = layer.running_var
    moves = layer.momentum is None or layer.momentum > 0
    return layer.track_running_stats and running is not None and running.dtype in PRECISE and moves
