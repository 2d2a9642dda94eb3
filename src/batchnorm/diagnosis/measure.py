"""Running a model on batches to see what its batch-norm layers measure; afterwards it is as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ..model.find import find
from ..model.given import given
from ..model.run import Call, each_of, undisturbed_random_state
from ..model.run import call as run_model
from ..tools.population import layers_of, measuring
from .forwards import Seen, pool, see
from .layer import ITSELF, Layer
from .measured import Measured
from .tracing import tracing_features

Loss = Callable[[Any, Any], Any]

_LONELY = "more than 1 value per channel"  # what torch.nn's layers and ours say of a batch they cannot train on


def measure(
    model: nn.Module,
    layers: Iterable[tuple[Layer, nn.Module]],
    batches: Iterable[Any],
    call: Call | None,
    loss: Loss | None,
    max_batches: int | None,
) -> list[tuple[Layer, Measured]]:
    """What the batches measure in every layer that normalizes with them; the others are left out.

    Those are the layers that `recalibrate` would set: dropout is off meanwhile, and nothing is tracked.

    Raises:
        ValueError: there was no batch.
    """
    measurable = layers_of(model)[0].values()
    chosen = [(layer, module) for layer, module in layers if any(module is each for each in measurable)]
    seen: dict[nn.Module, list[Seen]] = {module: [] for _, module in chosen}
    lonely: dict[nn.Module, int] = dict.fromkeys(seen, 0)
    calls: dict[nn.Module, int] = {}
    ran: dict[nn.Module, None] = {}  # in the order in which they first did
    first, sources = None, {}
    with ExitStack() as stack:
        stack.enter_context(undisturbed_random_state(model))
        stack.enter_context(torch.no_grad())
        stack.enter_context(measuring(model, measurable, by_batch=True))
        for _, module in chosen:
            hook = _recording(seen[module], lonely, ran)
            stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        for batch in each_of(batches, max_batches):
            if first is None:
                first = batch
                with tracing_features(model, sources):
                    _run(model, batch, call)
                calls = {module: len(found) + lonely[module] for module, found in seen.items()}
            else:
                _run(model, batch, call)
    if first is None:
        raise ValueError("expected at least one batch, but there was none (has an iterator been used up before?)")
    order = {module: i for i, module in enumerate(ran)}
    updates = _updates(model, first, call, loss) if loss else {}
    remainder = _remainder(batches)
    return [
        (
            layer,
            pool(
                seen[module],
                lonely=lonely[module],
                remainder=remainder,
                calls=calls[module],
                updates=updates.get(layer.name, calls[module]),
                features_from=sources.get(module),
                order=order[module],
            ),
        )
        for layer, module in chosen
        if seen[module] or lonely[module]
    ]


def target_of(batch: Any) -> Any:
    """What the loss compares the output with: the last of a tuple or list, else the batch itself."""
    return batch[-1] if isinstance(batch, (tuple, list)) and len(batch) > 1 else batch


def _run(model: nn.Module, batch: Any, call: Call | None) -> None:
    try:
        (call or run_model)(model, batch)
    except ValueError as error:
        if _LONELY not in str(error):  # that one has been counted, and is a finding
            raise


def _recording(seen: list[Seen], lonely: dict[nn.Module, int], ran: dict[nn.Module, None]) -> Callable[..., None]:
    def hook(layer: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        ran.setdefault(layer)
        x, mask = given(layer, args, kwargs)
        found = see(x.double(), mask)
        if found.values > 1:
            seen.append(found)
        else:
            lonely[layer] += 1

    return hook


def _updates(model: nn.Module, batch: Any, call: Call | None, loss: Loss) -> dict[str, int]:
    """How often one step, forward and backward, updates each layer's running statistics: seen on a copy."""
    with undisturbed_random_state(model), torch.enable_grad():
        try:
            twin = copy.deepcopy(model)
        except (TypeError, RuntimeError, NotImplementedError):
            return {}  # a model that cannot be copied is judged without
        before = _counters(twin)
        gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
        try:
            for parameter, _ in gradients:  # a loss may look at the model itself
                parameter.grad = None
            for module in twin.modules():
                module.training = True
            value = loss((call or run_model)(twin, batch), target_of(batch))
            if isinstance(value, Tensor) and value.requires_grad:
                value.backward()
        except ValueError as error:
            if _LONELY not in str(error):
                raise
            return {}
        finally:
            for parameter, gradient in gradients:
                parameter.grad = gradient
    return {name: count - before[name] for name, count in _counters(twin).items()}


def _counters(model: nn.Module) -> dict[str, int]:
    counters = ((found.name or ITSELF, found.adapter.batches(found.layer)) for found in find(model))
    return {name: int(counter) for name, counter in counters if counter is not None}


def _remainder(batches: Any) -> int | None:
    """Items in the last batch of a DataLoader; None where nobody can tell."""
    size, sampler = getattr(batches, "batch_size", None), getattr(batches, "sampler", None)
    if not isinstance(size, int) or size < 2 or sampler is None or getattr(batches, "drop_last", True):
        return None
    try:
        return (len(sampler) - 1) % size + 1
    except TypeError:
        return None
