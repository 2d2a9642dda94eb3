"""What the callbacks of all libraries share: recalibration that leaves the training under way undisturbed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from ..model.find import find
from ..model.run import undisturbed_random_state
from ..tools.recalibrate import recalibrate


class Recalibrator:
    """Recalibrates a model where that has not been done for the weights it has.

    Args:
        batches: how many to go over; None for all.
        data: the batches; None for those of the training's loader.
        call: as of `recalibrate`, as are the options.
    """

    def __init__(
        self,
        batches: int | None,
        data: Iterable[Any] | None,
        call: Callable[[Any, Any], Any] | None,
        options: dict[str, Any],
    ) -> None:
        self._batches, self._data, self._call, self._options = batches, data, call, options
        self._done: list[float] = []

    def __call__(self, model: nn.Module, loader: Any) -> None:
        """Set the running statistics of a model to those of the data.

        Args:
            model: in any mode, of which it is not taken out.
            loader: of the training data. A DataLoader of a map-style data set is not iterated itself, for the training
                is in the midst of it: the data set is gone through by another one, shuffled.
        """
        data = self._data if self._data is not None else _apart(loader)
        if data is None or _fingerprint(model.state_dict()) == self._done:
            return
        with undisturbed_random_state(model), torch.inference_mode(False):
            recalibrate(model, islice(data, self._batches), call=self._call, **self._options)
        self._done = _fingerprint(model.state_dict())

    def state(self, model: nn.Module, loader: Any, state: dict[str, Any]) -> None:
        """The same for a state_dict of the model, which may hold other weights; the model is left as it was."""
        if _fingerprint(state) == self._done:
            return
        before = {
            name: value.clone() if isinstance(value, Tensor) else value for name, value in model.state_dict().items()
        }
        try:
            model.load_state_dict(state)
            self(model, loader)
            after = model.state_dict()
            for found in find(model):
                for name in ("running_mean", "running_var", "num_batches_tracked"):
                    key = f"{found.name}.{name}" if found.name else name
                    if key in state:
                        state[key] = after[key].clone()
        finally:
            model.load_state_dict(before)


def _apart(loader: Any) -> Iterable[Any] | None:
    """The same data in another iteration, in a random order that draws from nobody's generator."""
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return loader
    size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None)
    if size is None:
        return loader
    generator = torch.Generator().manual_seed(0)
    return DataLoader(loader.dataset, size, shuffle=True, generator=generator, collate_fn=loader.collate_fn)


def _fingerprint(state: Mapping[str, Any]) -> list[float]:
    """A number for every tensor: the same state has the same, another one hardly ever."""
    tensors = [value for value in state.values() if isinstance(value, Tensor) and value.numel()]
    return [float(value.detach().double().sum()) for value in tensors]
