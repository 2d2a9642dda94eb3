"""Catching what one training step measures, tracks and learns, without disturbing it: hooks and one concatenation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ._digest import UNKNOWN, Flats, Layout, Part, Snapshot, Way
from .schema import LayerInfo

# Nodes that keep the batch mean as result1 and 1 / sqrt(batch variance + eps) as result2.
_NODES = frozenset({"NativeBatchNormBackward0", "CudnnBatchNormBackward0", "MiopenBatchNormBackward0"})
_PRECISE = (torch.float32, torch.float64)  # half precision keeps too few digits of a saved or a running statistic


@dataclass(slots=True)
class Moment:
    """What one forward measured: the count a channel, and two (C,) tensors that are what `way` says."""

    way: Way
    count: int | Tensor
    first: Tensor | None = None
    second: Tensor | None = None


class Switch:
    """What the hooks of a recorder look at before they do anything."""

    on = False  # whether the step under way is recorded
    paused = False  # while probing: no forward is a training step's


class Hook:
    """A module's hook that compiled code passes over and that a copy of the module does not take along.

    Args:
        call: what it does, with the arguments of the hook.
    """

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
        self._last_measured = _measured(layer)
        self._inverts = True

    def __call__(self, *args: Any) -> None:
        if torch.compiler.is_compiling():
            # Of a compiled forward the hook leaves this one assignment; the rest is had by inversion.
            self.traced_count = _count(_input(*args))
        else:
            self._call(*args)

    def _on_forward(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        if not layer.training or self._switch.paused:
            return
        measured, self._last_measured = self._last_measured, _measured(layer)
        fresh = self._last_measured if self._last_measured is not measured else None
        self.forwards += 1
        self.untracked += 1
        # Inside a backward it is recomputed (activation checkpointing): the same batch again, counted but not added.
        if self._switch.on and torch._C._current_graph_task_id() == -1:
            self.moments.append(self._moment(layer, _input(layer, args, kwargs, out), out, fresh))

    def reset(self) -> None:
        """Begin the next step."""
        if self.forwards > 1 and any(moment.way == Way.INVERT for moment in self.moments):
            self._inverts = False  # it runs more than once a step: measure it from now on
        self.moments, self.forwards = [], 0

    def _moment(self, layer: nn.Module, x: Tensor, out: Any, measured: Any) -> Moment:
        if measured is not None:
            return _handed_over(measured)
        count = _count(x)
        node = getattr(out, "grad_fn", None)
        if type(node).__name__ in _NODES:
            return _saved(node, count) or measure(x)
        if self._inverts and self.untracked == 1 and torch.is_grad_enabled() and _is_tracked(layer):
            return Moment(Way.INVERT, count)
        return measure(x)


def _input(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Tensor:
    return args[0] if args else kwargs["input"]


def _count(x: Tensor) -> int:
    """How many values a channel has, N * S."""
    return x.numel() // x.shape[1]


def _unwatched() -> Callable[..., None]:
    return _nothing


def _nothing(*args: Any) -> None:
    """The hook that a copy of a watched layer is left with."""


def _measured(layer: nn.Module) -> Any:
    """The layer's `measured` attribute, if it is one of those that hand their moments over."""
    if hasattr(type(layer), "measured"):
        return layer.measured
    return vars(layer).get("measured")


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
    return Moment(Way.RSTD, count, mean, rstd) if rstd.dtype in _PRECISE else None


def _is_tracked(layer: Any) -> bool:
    """Whether the running statistics say what the batch's were."""
    running = layer.running_var
    moves = layer.momentum is None or layer.momentum > 0
    return layer.track_running_stats and running is not None and running.dtype in _PRECISE and moves


_NOTHING = Moment(Way.NONE, 0)


def measure(x: Tensor) -> Moment:
    """Measure the input itself: in float64, around the mean. The dearest way, and always open."""
    x = x.detach()
    over = [dim for dim in range(x.dim()) if dim != 1]
    count = _count(x)
    if count == 0:
        return _NOTHING
    variance, mean = torch.var_mean(x.double(), dim=over, correction=0)
    return Moment(Way.VARIANCE, count, mean, variance)


class Capture:
    """The watched layers of a model, and the way from them to a `Snapshot`."""

    def __init__(self, layers: Sequence[tuple[LayerInfo, Any]], device: torch.device | None) -> None:
        self.switch = Switch()
        layout = Layout([info for info, _ in layers])
        self._watches = [LayerWatch(layers[i][1], layers[i][0], self.switch) for i in layout.order]
        self._handles = [w.layer.register_forward_hook(w, with_kwargs=True) for w in self._watches]
        self._channels = layout.channels
        # Stands in for what does not exist, so that everything has its fixed place in the concatenation.
        self._zeros = [torch.zeros(w.info.channels, device=device) for w in self._watches]

    def remove(self) -> None:
        """Take the hooks out again."""
        for handle in self._handles:
            handle.remove()

    def begin(self, recorded: bool) -> None:
        """Forget the forwards so far: a step begins, to be recorded or not."""
        self.switch.on = recorded
        for watch in self._watches:
            watch.reset()

    def unseen(self) -> bool:
        """Whether a layer in train mode ran past its hook, or not at all: only its counter can tell."""
        return any(w.layer.training and not w.forwards and _is_tracked(w.layer) for w in self._watches)

    def take(
        self, step: int, *, recorded: bool = True, gradients: bool = True, scale: Tensor | None = None
    ) -> Snapshot:
        """Everything the step measured, tracked and learned, on its way to the host.

        Args:
            step: its number.
            recorded: else only where the running statistics stand.
            gradients: read them too; else `add_gradients` later, or never.
            scale: what a gradient scaler has multiplied them by, one number.
        """
        moments, extras, parameters, counts = _Section(), _Section(), _Section(), _Section()
        parts, present = [], []
        for w, zero in zip(self._watches, self._zeros, strict=True):
            for k, m in enumerate(w.moments or (_NOTHING,)):
                (extras if k else moments).add(zero, m.first, m.second)
            parts.append([_part(m, counts) for m in w.moments])
            exists = parameters.add(zero, *_state(w.layer))
            present.append((exists & 0b11) << 2 | (exists >> 2) << 6)
            w.untracked = 0
        grads = _Section()
        if gradients:
            present = [bits | more for bits, more in zip(present, self._add_gradients(grads), strict=True)]
        if scale is not None:
            extras.add(scale, scale.reshape(1))
        ways = {part.way for of_layer in parts for part in of_layer}
        sent = [moments, extras, parameters, grads]
        if ways.isdisjoint((Way.M2, Way.VARIANCE)):
            fetch = _send(sent)
        else:  # these are float64, and concatenating unlike types is slow
            batch, rest = _send(sent[:2]), _send(sent[2:])
            fetch = lambda: batch() + rest()  # noqa: E731
        inverts = not recorded or Way.INVERT in ways or self.unseen()
        fetch_counts = _send([counts])
        fetch_tracked = _send([self._counters()]) if inverts else None

        def flats() -> Flats:
            first, more, state, slopes = fetch()
            if scale is not None:
                more, slopes = more[:-1], slopes / more[-1]
            tracked = fetch_tracked()[0] if fetch_tracked else None
            return Flats(first, state, slopes if gradients else None, more, fetch_counts()[0], tracked)

        return Snapshot(
            step=step,
            recorded=recorded,
            fetch=flats,
            parts=parts,
            forwards=[w.forwards for w in self._watches],
            present=present,
            momenta=[w.layer.momentum for w in self._watches],
            traced_counts=[w.traced_count for w in self._watches],
        )

    def add_gradients(self, snapshot: Snapshot) -> None:
        """Read the gradients as they are now into a snapshot taken without them."""
        grads = _Section()
        more = self._add_gradients(grads)
        snapshot.present = [bits | extra for bits, extra in zip(snapshot.present, more, strict=True)]
        fetch, fetch_gradients = snapshot.fetch, _send([grads])
        snapshot.fetch = lambda: fetch()._replace(gradients=fetch_gradients()[0])

    def owns(self, parameter: Tensor) -> bool:
        """Whether it is the gamma or beta of a watched layer."""
        return any(parameter is p for w in self._watches for p in w.layer._parameters.values())

    def _add_gradients(self, section: _Section) -> list[int]:
        """Fill the section with every layer's; returns which exist, as bits of QUANTITIES."""
        bits = []
        for w, zero in zip(self._watches, self._zeros, strict=True):
            gamma, beta, *_ = _state(w.layer)
            bits.append(section.add(zero, _gradient(gamma), _gradient(beta)) << 4)
        return bits

    def _counters(self) -> _Section:
        section = _Section()
        for w, zero in zip(self._watches, self._zeros, strict=True):
            counter = w.layer.num_batches_tracked
            section.add(zero, (zero.new_zeros((), dtype=torch.int64) if counter is None else counter).reshape(1))
        return section


class _Section:
    """Tensors that travel together, in a fixed order."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.size = 0

    def add(self, zero: Tensor, *tensors: Tensor | None) -> int:
        """Add one-dimensional tensors, `zero` for each that is None; returns which exist, as bits."""
        exists = 0
        for bit, tensor in enumerate(tensors):
            if tensor is not None:
                exists |= 1 << bit
            self.tensors.append(zero if tensor is None else tensor)
            self.size += self.tensors[-1].numel()
        return exists


def _part(moment: Moment, on_device: _Section) -> Part:
    """The moment without its tensors; a count that is on another device than the host travels with the others."""
    count = moment.count
    if not isinstance(count, Tensor):
        return Part(moment.way, count)
    if count.device.type == "cpu":
        return Part(moment.way, int(count))
    on_device.add(count, count.reshape(1))
    return Part(moment.way, None)


def _state(layer: Any) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """gamma, beta, running mean and running variance; None for those that the layer has not."""
    return layer.weight, layer.bias, layer.running_mean, layer.running_var


def _gradient(parameter: Tensor | None) -> Tensor | None:
    return parameter.grad if parameter is not None and parameter.is_leaf else None


@torch.no_grad()
def _send(sections: Sequence[_Section]) -> Callable[[], list[np.ndarray]]:
    """Start the sections' way to the host, as one concatenation and one copy; call the result to have them there."""
    tensors = [tensor for section in sections for tensor in section.tensors]
    edges = np.cumsum([section.size for section in sections])[:-1]
    if not tensors:
        return lambda: [np.empty(0, np.float32) for _ in sections]
    try:
        flat = torch.cat(tensors)
    except RuntimeError:  # layers on several devices
        flat = torch.cat([tensor.to(tensors[0].device) for tensor in tensors])
    if flat.is_floating_point() and flat.dtype not in _PRECISE:
        flat = flat.float()
    if flat.device.type != "cuda":
        array = flat.numpy(force=True)
        return lambda: np.split(array, edges)
    with torch.cuda.device(flat.device):
        host = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=True)
        host.copy_(flat, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()

    def fetch() -> list[np.ndarray]:
        arrived.synchronize()
        return np.split(host.numpy(), edges)

    return fetch
