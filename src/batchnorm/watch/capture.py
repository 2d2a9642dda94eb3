"""Copy everything that one step produced from the layers to the host, in one concatenation and one copy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from ..mixin import option
from ..runs.schema import LayerInfo
from .hooks import NOTHING, PRECISE, LayerWatch, Switch, is_tracked
from .snapshot import ON_DEVICE, Flats, Layout, Part, Snapshot, Way


class Capture:
    """The watched layers of a model, and the way from them to a `Snapshot`.

    Args:
        layers: to be watched.
        device: where the model is.
        comes_off: remove the hooks during steps that are not recorded. Else they stay: compiled code must see them when
            it is traced, and they count how often a layer ran.
        tells: whether `ran` will be called.
    """

    def __init__(
        self,
        layers: Sequence[tuple[LayerInfo, Any]],
        device: torch.device | None,
        comes_off: bool = False,
        tells: bool = True,
    ) -> None:
        self.switch = Switch()
        self._comes_off, self._tells = comes_off, tells
        layout = Layout([info for info, _ in layers])
        self._watches = [LayerWatch(layers[i][1], layers[i][0], self.switch) for i in layout.order]
        self._handles: list[RemovableHandle] = []
        self._attach()
        self._channels = layout.channels
        # Replaces tensors that do not exist, so that each has a fixed place in the concatenation.
        self._zeros = [torch.zeros(w.info.channels, device=device) for w in self._watches]
        self._reads_counters = False
        self.begin(True)

    def _attach(self) -> None:
        self._handles = [w.layer.register_forward_hook(w, with_kwargs=True) for w in self._watches]

    def remove(self) -> None:
        """Take the hooks out again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def begin(self, recorded: bool) -> None:
        """Forget the forwards so far; a step begins, and is recorded or not."""
        self.switch.on = recorded
        if self._tells:
            for watch in self._watches:
                watch.mark()
        if not (recorded or self._handles):
            return
        for watch in self._watches:
            watch.reset()
        if recorded and not self._handles:
            self._attach()
            for watch in self._watches:
                watch.untracked = 1  # at least one; they were not counted
        elif self._comes_off and not recorded:
            self.remove()

    def unseen(self) -> bool:
        """Whether a layer in train mode bypassed its hook, or did not run: only its counter can tell."""
        if self._watches and not self._handles:
            return self._reads_counters  # as it was when they were there
        return any(w.layer.training and not w.forwards and is_tracked(w.layer) for w in self._watches)

    @property
    def is_blind(self) -> bool:
        """Whether there are no layers to tell that a step has run."""
        return not self._watches

    def ran(self) -> bool:
        """Whether a layer ran in train mode since the step began."""
        return any(w.forwards or (self._tells and w.moved()) for w in self._watches)

    def forwards(self) -> list[int]:
        """How often each layer ran in train mode since the step began, as far as the hooks saw it."""
        return [w.forwards for w in self._watches]

    def take(
        self, step: int, *, index: int | None = 0, gradients: bool = True, scale: Tensor | None = None
    ) -> Snapshot:
        """Start copying everything the step measured, tracked and learned to the host.

        Args:
            step: its number.
            index: of its record; None if it has no record and only the running statistics are taken.
            gradients: read them too; else `add_gradients` later, or never.
            scale: what a gradient scaler has multiplied them by, one number.
        """
        moments: list[Tensor] = []
        extras: list[Tensor] = []
        state: list[Tensor] = []
        device_counts: list[Tensor] = []
        more_device_counts: list[Tensor] = []
        ways: list[int] = []
        counts: list[int] = []
        more: list[tuple[int, Part]] = []
        present: list[int] = []
        for i, (w, zero) in enumerate(zip(self._watches, self._zeros, strict=True)):
            m = w.moments[0] if w.moments else NOTHING
            moments.extend((zero if m.first is None else m.first, zero if m.second is None else m.second))
            ways.append(m.way)
            counts.append(_host_count(m.count, device_counts))
            for m in w.moments[1:]:
                extras.extend((zero if m.first is None else m.first, zero if m.second is None else m.second))
                more.append((i, Part(m.way, _host_count(m.count, more_device_counts))))
            of_layer = _state(w.layer)
            state.extend([zero if tensor is None else tensor for tensor in of_layer])
            present.append(_bits(of_layer, (2, 3, 6, 7)))
            w.untracked = 0
        slopes: list[Tensor] = []
        if gradients:
            slopes, slopes_present = self._gradients()
            present = [bits | extra for bits, extra in zip(present, slopes_present, strict=True)]
        if scale is not None:
            extras.append(scale.reshape(1))
        taken = {*ways, *(part.way for _, part in more)}
        fetch = self._send_all(moments, extras, state, slopes, exact=not taken.isdisjoint((Way.M2, Way.VARIANCE)))
        # A layer that once bypassed its hook, or had to be inverted, may do so at any step.
        self._reads_counters = self._reads_counters or Way.INVERT in taken or self.unseen()
        fetch_counts = send(device_counts + more_device_counts)
        fetch_counters = send(self._counters()) if self._reads_counters or index is None else None

        def flats() -> Flats:
            batch, rest, parameters, grads = fetch()
            return Flats(
                moments=batch,
                parameters=parameters,
                gradients=None if not gradients else grads if scale is None else grads / rest[-1],
                extras=rest,
                counts=fetch_counts()[0],
                tracked=fetch_counters()[0] if fetch_counters else None,
            )

        return Snapshot(
            step=step,
            index=index,
            fetch=flats,
            ways=ways,
            counts=counts,
            more=more,
            forwards=self.forwards(),
            present=present,
            momenta=[w.layer.momentum for w in self._watches],
            unbiased=[option(w.layer, "unbiased", True) for w in self._watches],
            traced_counts=[w.traced_count for w in self._watches],
        )

    @torch.no_grad()
    def add_gradients(self, snapshot: Snapshot, scale: Tensor | None = None) -> None:
        """Read the gradients as they are now, without their scale, into a snapshot taken without them."""
        slopes, more = self._gradients()
        if scale is not None:
            slopes = [slope / scale for slope in slopes]
        fetch, fetch_slopes = snapshot.fetch, send(slopes)
        snapshot.present = [bits | extra for bits, extra in zip(snapshot.present, more, strict=True)]
        snapshot.fetch = lambda: fetch()._replace(gradients=fetch_slopes()[0])

    def _gradients(self) -> tuple[list[Tensor], list[int]]:
        """Those of gamma and beta of every layer, and which exist, as bits of QUANTITIES."""
        slopes: list[Tensor] = []
        present: list[int] = []
        for w, zero in zip(self._watches, self._zeros, strict=True):
            learned = w.layer._parameters.get("weight"), w.layer._parameters.get("bias")
            of_layer = [None if parameter is None else parameter.grad for parameter in learned]
            slopes.extend([zero if slope is None else slope for slope in of_layer])
            present.append(_bits(of_layer, (4, 5)))
        return slopes, present

    def _counters(self) -> list[Tensor]:
        """How often each layer's running statistics were updated; 0 where they are not tracked."""
        counters = (w.layer.num_batches_tracked for w in self._watches)
        return [
            (torch.zeros_like(zero[0], dtype=torch.int64) if counter is None else counter).reshape(1)
            for zero, counter in zip(self._zeros, counters, strict=True)
        ]

    def _send_all(
        self, moments: list[Tensor], extras: list[Tensor], state: list[Tensor], slopes: list[Tensor], *, exact: bool
    ) -> Callable[[], list[np.ndarray]]:
        """Send these four, in this order. `exact` moments are float64 and sent apart, because mixing dtypes is slow."""
        c = self._channels
        if exact:
            batch, rest = send([*moments, *extras], 2 * c), send([*state, *slopes], 4 * c)
            return lambda: batch() + rest()
        whole = send([*moments, *state, *slopes, *extras], 2 * c, 6 * c, (8 if slopes else 6) * c)

        def fetch() -> list[np.ndarray]:
            batch, parameters, grads, more = whole()
            return [batch, more, parameters, grads]

        return fetch


def _state(layer: Any) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """gamma, beta, running mean and running variance; None for those that the layer has not."""
    parameters, buffers = layer._parameters, layer._buffers  # a module's own look-up is ten times slower
    if "weight" not in parameters or "bias" not in parameters:  # parametrized: computed on access
        return layer.weight, layer.bias, layer.running_mean, layer.running_var
    return parameters["weight"], parameters["bias"], buffers["running_mean"], buffers["running_var"]


def _bits(tensors: Sequence[Tensor | None], places: Sequence[int]) -> int:
    """Which exist, as bits at their places in QUANTITIES."""
    return sum([1 << place for tensor, place in zip(tensors, places, strict=True) if tensor is not None])


def _host_count(count: int | Tensor, device_counts: list[Tensor]) -> int:
    """The count. One that is on the device joins the others that are sent: reading it now would wait for the device."""
    if not isinstance(count, Tensor):
        return count
    if count.device.type == "cpu":
        return int(count)
    device_counts.append(count.reshape(1))
    return ON_DEVICE


@torch.no_grad()
def send(tensors: list[Tensor], *edges: int) -> Callable[[], list[np.ndarray]]:
    """Start the tensors' way to the host, in one copy; call the result for their numbers, cut at the edges."""
    if not tensors:
        return lambda: [np.empty(0, np.float32)] * (len(edges) + 1)
    try:
        flat = torch.cat(tensors)
    except RuntimeError:  # layers on several devices
        flat = torch.cat([tensor.to(tensors[0].device) for tensor in tensors])
    if flat.is_floating_point() and flat.dtype not in PRECISE:
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
