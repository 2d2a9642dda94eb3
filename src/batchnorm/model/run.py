"""Calling a model on a loader's batches, copying it, and running it without leaving a trace in it."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin  # pyright: ignore[reportAttributeAccessIssue]
from torch.utils import _pytree
from torch.utils.data import Dataset, IterableDataset

from .find import bare

Model = TypeVar("Model", bound=nn.Module)
Call = Callable[[Any, Any], Any]


def unwrapped(model: nn.Module) -> nn.Module:
    """The model to call, without torch.compile and data parallelism.

    Compiled code calls no hooks, and DistributedDataParallel's forward waits for ranks that may have fewer batches.
    FSDP stays, because the parameters do not exist without it.
    """
    return bare(model, ("_orig_mod",))


def each_of(batches: Iterable[Any], max_batches: int | None) -> Iterator[Any]:
    """The batches, at most `max_batches` of them.

    Raises:
        TypeError: `batches` is a single batch or a data set. Iterating over an array would give its items, over a data
            set its samples, and over a mapping its names.
    """
    if isinstance(batches, (Tensor, np.ndarray)):
        raise TypeError(
            f"expected batches, one after the other, but got one {type(batches).__name__} of {tuple(batches.shape)}: "
            "pass [x] if it is one batch, x.split(256) if it is all the data, list(x) if it is a stack of batches"
        )
    if isinstance(batches, Mapping):
        raise TypeError(
            f"expected batches, one after the other, but got one {type(batches).__name__} with "
            f"{', '.join(map(repr, batches))}: pass [batch]"
        )
    if isinstance(batches, Dataset) and not isinstance(batches, IterableDataset):
        raise TypeError(
            f"expected batches, one after the other, but got a {type(batches).__name__}, whose items are samples: pass "
            "DataLoader(dataset, batch_size=256), or with batch_size=None if they are batches"
        )
    return islice(batches, max_batches)


def call(model: Any, batch: Any) -> Any:
    """The model's output for a batch: x, a tuple that starts with x, or a mapping of keyword arguments.

    Tensors go to the device of the model's first parameter.
    """
    parameter = next(model.parameters(), None)
    inputs = batch[0] if isinstance(batch, (tuple, list)) else batch

    def place(value: Any) -> Any:
        return value.to(parameter.device) if isinstance(value, Tensor) and parameter is not None else value

    if isinstance(inputs, Mapping):
        return model(**{name: place(value) for name, value in inputs.items()})
    return model(place(inputs))


@contextmanager
def undisturbed_random_state(model: nn.Module) -> Iterator[None]:
    """Restore the random state at the end of the block, on the model's devices too."""
    devices = {tensor.device.index or 0 for tensor in model.parameters() if tensor.device.type == "cuda"}
    with torch.random.fork_rng(sorted(devices)):
        yield


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Run the model eagerly and without gradients in the block; restore buffers, flags and random state at its end.

    Clones replace the buffers in the block. The originals are not touched, so a pending backward stays valid.
    """
    modules = list(model.modules())
    flags = [vars(module).get("training", module.training) for module in modules]
    buffers = [dict(module._buffers) for module in modules]
    with ExitStack() as stack:
        stack.enter_context(undisturbed_random_state(model))
        stack.enter_context(torch.no_grad())
        if "torch._dynamo" in sys.modules:  # hooks see nothing of a compiled forward
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            for module in modules:
                for name, buffer in module._buffers.items():
                    module._buffers[name] = None if buffer is None else buffer.clone()
            yield
        finally:
            for module, flag, originals in zip(modules, flags, buffers, strict=True):
                module.training = flag
                module._buffers.update(originals)


def copied(model: Model) -> Model:
    """A deep copy of the model, checked: each module in the same mode, each tensor with the same values.

    A tensor computed by autograd, which torch does not copy, is copied without its history.

    Raises:
        ValueError: the model's own way of copying gives a different model.
    """
    values = [value for m in model.modules() for name, value in vars(m).items() if name != "_modules"]
    made = [t for t in _pytree.tree_leaves(values) if isinstance(t, Tensor) and t.grad_fn is not None]
    twin = copy.deepcopy(model, {id(t): t.detach().clone() for t in made})
    modules, twins = dict(model.named_modules()), dict(twin.named_modules())
    state, other = model.state_dict(), twin.state_dict()
    same = modules.keys() == twins.keys() and state.keys() == other.keys()
    if not same or not all(_equal(state[name], other[name]) for name in state):
        raise ValueError(
            f"a deep copy of {type(model).__name__} differs from it in modules or values: look at its "
            "__deepcopy__, or pass its parts one by one"
        )
    for name, module in modules.items():
        twins[name].training = module.training
    return twin


def _equal(a: Any, b: Any) -> bool:
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return True  # extra state, which defines its own equality
    if a.is_meta or isinstance(a, UninitializedTensorMixin):
        return True
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())
