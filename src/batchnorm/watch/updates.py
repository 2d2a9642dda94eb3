"""At a few chosen steps: what the optimizer receives for every gamma and beta, and their values after its step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..runs.schema import OPTIMIZERS, UPDATES, LayerInfo
from ..runs.update import STATES, encode, kept_channels
from .capture import send
from .snapshot import Extra

# How a step is computed, not what: and what is no option at all.
_UNTOLD = frozenset({"params", "step", "foreach", "fused", "capturable", "differentiable", "initial_lr"})


class _Part(NamedTuple):
    """A gamma or beta that the optimizer is about to move."""

    layer: int
    quantity: int  # index in LEARNED
    parameter: nn.Parameter
    tensors: list[Tensor]  # before, gradient, state
    facts: dict[str, Any]


class Updates:
    """Takes chosen steps whole: `before` the optimizer's step, `after` it; `forget` where there was none.

    Args:
        layers: the watched ones, in model order.
        wanted: whether any are to be kept.
    """

    def __init__(self, layers: Sequence[tuple[LayerInfo, Any]], wanted: bool) -> None:
        self._layers = [layer for _, layer in layers]
        self._kept = kept_channels([info for info, _ in layers])
        self._wanted = wanted and any(map(len, self._kept))
        self._pending: tuple[Optimizer, int, list[_Part], Callable[[], list[np.ndarray]], Tensor | None] | None = None

    def chooses(self, index: int) -> bool:
        """Whether the record of this index is worked: 0 to 5, and from each power of two on a pair.

        So early, middle and late steps are there whenever a training stops, and a resumed one chooses the same.

        Example:
            >>> updates = Updates([(LayerInfo("bn", "BatchNorm1d", 3, 1e-5, 0.1, True, True), None)], wanted=True)
            >>> [i for i in range(70) if updates.chooses(i)]
            [0, 1, 2, 3, 4, 5, 8, 9, 16, 17, 32, 33, 64, 65]
        """
        even = index & ~1
        return self._wanted and even & (even - 1) == 0

    def before(self, step: int, index: int, optimizer: Optimizer | None, scale: Tensor | None) -> None:
        """Copy what the optimizer is about to use, where the record is chosen.

        Args:
            step: the training step.
            index: of its record.
            optimizer: that is about to step; None where it is not known.
            scale: what a gradient scaler has multiplied the gradients by, one number.
        """
        self._pending = None
        if optimizer is None or not self.chooses(index):
            return
        parts = list(self._parts(optimizer))
        if parts:
            tensors = [tensor for part in parts for tensor in part.tensors]
            fetch = send(tensors if scale is None else [*tensors, scale.reshape(1)])
            self._pending = optimizer, step, parts, fetch, scale

    def after(self, optimizer: Optimizer) -> Extra | None:
        """The whole step, if it was chosen and this optimizer has taken it."""
        pending, self._pending = self._pending, None
        if pending is None or pending[0] is not optimizer:
            return None
        _, step, parts, fetch, scale = pending
        fetch_after = send([part.parameter for part in parts])

        def contents() -> dict[str, Any]:
            after, before = fetch_after()[0], fetch()[0]
            changes: list[list[Any]] = [[] for _ in self._layers]
            at = end = 0
            for part in parts:
                n = part.parameter.numel()
                values, gradient, *state = before[at : at + n * len(part.tensors)].reshape(-1, n)
                gradient = gradient if scale is None else gradient / before[-1]
                arrays = [values, gradient, after[end : end + n], *state]
                facts = {name: _number(value) for name, value in part.facts.items()}
                facts["skipped"] = bool(facts["skipped"])
                changes[part.layer].append((part.quantity, arrays, facts))
                at, end = at + n * len(part.tensors), end + n
            payload, rows = encode(step, self._kept, changes)
            return {OPTIMIZERS: rows, UPDATES: payload}  # in this order: no frame without its lines

        return Extra(step, contents)

    def forget(self) -> None:
        """The step is over."""
        self._pending = None

    def _parts(self, optimizer: Optimizer) -> Any:
        groups = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
        kind = type(optimizer)
        ours = kind.__module__.startswith("torch.optim.")
        name = kind.__qualname__ if ours else f"{kind.__module__}.{kind.__qualname__}"
        skipped = _copy(getattr(optimizer, "found_inf", None) if hasattr(optimizer, "grad_scale") else None)
        for i, layer in enumerate(self._layers):
            for q, parameter in enumerate((layer._parameters.get("weight"), layer._parameters.get("bias"))):
                if parameter is None or parameter.grad is None or parameter not in groups:
                    continue
                state = optimizer.state.get(parameter, {})
                found = [key for key in STATES.get(name, ()) if isinstance(state.get(key), Tensor)]
                facts = {
                    "optimizer": name,
                    "state": " ".join(found),
                    "steps": _copy(state.get("step", 0)),
                    "skipped": skipped,
                    "dtype": str(parameter.dtype).removeprefix("torch."),
                }
                facts = {**_options(groups[parameter]), **facts}
                yield _Part(i, q, parameter, [parameter, parameter.grad, *(state[key] for key in found)], facts)


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers among a group's options; those of a tuple one by one: betas as beta1 and beta2."""
    options: dict[str, Any] = {}
    for name, value in group.items():
        if name not in _UNTOLD:
            several = isinstance(value, (tuple, list))
            named = {f"{name.rstrip('s')}{k}": each for k, each in enumerate(value, 1)} if several else {name: value}
            options |= {key: _copy(each) for key, each in named.items() if _is_number(each)}
    return options


def _is_number(value: Any) -> bool:
    return isinstance(value, (bool, int, float)) or (isinstance(value, Tensor) and value.numel() == 1)


@torch.no_grad()
def _copy(value: Any) -> Any:
    """A number as it is now; one on a device as a copy there, for reading it would wait for the device."""
    if not isinstance(value, Tensor):
        return value
    return value.item() if value.device.type == "cpu" else value.clone()


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) else value
