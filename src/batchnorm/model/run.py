"""A model called on a batch as loaders make it, copied, and run without a trace of it left behind."""

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
    FSDP stays: without it the parameters are not there.
    """
    return bare(model, ("_orig_mod",))


def each_of(batches: Iterable[Any], max_batches: int | None) -> Iterator[Any]:
    """The batches, so many at most.

    Raises:
        TypeError: they are one batch, or a data set: an array would be gone over item by item, a data set sample by
            sample, and a mapping name by name.
    """
    if isinstance(batches, (Tensor, np.ndarray)):
        raise TypeError(
            f"expected batches, one after the other, but got one {type(batches).__name__} of {tuple(batches.shape)}: "
            "pass [x] if it is a batch, x.split(256) if it is all the data, list(x) if it is batches, stacked"
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
    """The model's output for a batch: x, (x, ...) of which the first is the input, or a mapping of keyword arguments.

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
    """Inside the block random numbers may be drawn; afterwards the state is as it was, on the model's devices too."""
    devices = {tensor.device.index or 0 for tensor in model.parameters() if tensor.device.type == "cuda"}
    with torch.random.fork_rng(sorted(devices)):
        yield


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Inside the block the model runs eagerly, without gradients; afterwards buffers, flags, randomness are as before.

    Clones take the buffers' places: the real ones are not even touched, so a backward under way stays valid.
    """
    modules = list(model.modules())
    flags = [vars(module).get("training", module.training) for module in modules]
    buffers = [dict(module._buffers) for module in modules]
    with ExitStack() as stack:
        stack.enter_context(undisturbed_random_state(model))
        stack.enter_context(torch.no_grad())
        if "torch._dynamo" in sys.modules:  # of a compiled forward hooks would see nothing
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
    """A deep copy that is the same model: each module in its mode, each tensor with its values.

    A tensor that autograd has made, which torch does not copy, is copied without its history.

    Raises:
        ValueError: the model's own way of copying makes another model of it.
    """
    values = [value for m in model.modules() for name, value in vars(m).items() if name != "_modules"]
    made = [t for t in _pytree.tree_leaves(values) if isinstance(t, Tensor) and t.grad_fn is not None]
    twin = copy.deepcopy(model, {id(t): t.detach().clone() for t in made})
    modules, twins = dict(model.named_modules()), dict(twin.named_modules())
    state, other = model.state_dict(), twin.state_dict()
    same = modules.keys() == twins.keys() and state.keys() == other.keys()
    if not same or not all(_equal(state[name], other[name]) for name in state):
        raise ValueError(
            f"a deep copy of {type(model).__name__} is another model, with other modules or values: look at its "
            "__deepcopy__, or pass its parts one by one"
        )
    for name, module in modules.items():
        twins[name].training = module.training
    return twin


def _equal(a: Any, b: Any) -> bool:
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return True  # extra state, which says for itself what it is equal to
    if a.is_meta or isinstance(a, UninitializedTensorMixin):
        return True
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())
