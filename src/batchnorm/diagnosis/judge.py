"""diagnose(): hands what it is given to the rules that can judge it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

import numpy as np

from ..runs.reader import Run, open_run
from ..runs.schema import RUN
from .finding import Finding
from .findings import Findings
from .history import histories
from .layer import Layer
from .rules import SETTLED, judge

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

Source = Union["str | os.PathLike[str] | Run | Mapping[str, Any] | nn.Module"]
BATCHES = 32


def diagnose(
    source: Source | Sequence[Source],
    batches: Iterable[Any] | None = None,
    *,
    loss: Callable[[Any, Any], Any] | None = None,
    call: Callable[[Any, Any], Any] | None = None,
    optimizer: Optimizer | None = None,
    max_batches: int | None = BATCHES,
) -> Findings:
    """Find what is wrong with a model's batch normalization: what, in which layer, on what evidence, and the remedy.

    The more it is given, the more it can tell:

    - a checkpoint (a .safetensors file, or one of tensors that torch.save wrote) or a state_dict: values. No code of
      the model is needed, and nothing is unpickled.
    - a run, a folder that `watch` wrote or what `open_run` returned: what happened in training. torch is not imported.
    - a model: values, settings, modes, neighbours. It is not run.
    - a model and batches: what they measure. The model is run in train mode, dropout off, and is afterwards as it was,
      also if it raises: buffers, modes, gradients, random state.
    - a list of any of these, from several ranks: whether they agree.

    Args:
        source: any of the above.
        batches: tensors, tuples that begin with the input, or dicts of keyword arguments, as a DataLoader gives them.
        loss: `loss(output, target)`, one number; the target is the last entry of a tuple, else the whole batch. With it
            train mode and eval mode are compared as in `compare_modes`, and a backward is run too.
        call: `call(model, batch)`, how the model is run on a batch; by default model(x), or model(**batch) of a dict.
        optimizer: the model's: is there weight decay on gamma and beta?
        max_batches: measure so many of the batches; None for all.

    Returns:
        A list of `Finding`, worst first. Printed, it is a report.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: a file that is no checkpoint or holds other objects than tensors; a folder that is no run; no
            batch-norm layer in a model or checkpoint; batches that are empty.
        TypeError: something else than the above, or batches without a model.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, momentum=0.99), nn.ReLU())
        >>> for finding in bn.diagnose(model):
        ...     print(finding.severity, finding.rule, finding.layer, finding.remedy)
        serious momentum 1 model.get_submodule('1').momentum = 0.01
        note bias 1 model.get_submodule('0').bias = None  # before training
    """
    with np.errstate(all="ignore"):  # what is not finite is data here
        if isinstance(source, (list, tuple)):
            _refuse(batches, optimizer)
            return Findings(_of_copies(source))
        if not _is_module(source):
            _refuse(batches, optimizer)
            return Findings(_of_files(source))
        from .model import model_layers

        layers = model_layers(source, optimizer)  # pyright: ignore[reportArgumentType]
        found = [finding for layer, _ in layers for finding in judge("layer", layer)]
        if batches is not None:
            measured, more = _of_batches(source, layers, batches, call, loss, max_batches)
            found = [each for each in found if not (each.rule in SETTLED and each.layer in measured)] + more
        return Findings(found)


def _of_batches(
    model: Any, layers: Any, batches: Iterable[Any], call: Any, loss: Any, max_batches: int | None
) -> tuple[set[str], list[Finding]]:
    """The names of the layers that were measured, and what was found."""
    from ..model.run import unwrapped
    from .measure import measure
    from .modes import compare_modes

    batches = batches if not isinstance(batches, Iterator) else list(islice(batches, max_batches))
    measured = measure(unwrapped(model), layers, batches, call, loss, max_batches)
    found = [finding for layer, of_layer in measured for finding in judge("measured", layer, of_layer)]
    # Before training, eval mode is worse: nothing is wrong with that.
    trained = not all(layer.is_new for layer, _ in measured)
    if loss is not None and trained and not any(of_layer.lonely for _, of_layer in measured):
        found += judge("modes", compare_modes(model, batches, loss, call=call, max_batches=max_batches))
    return {layer.name for layer, of_layer in measured if of_layer.batches}, found


def _is_module(source: Any) -> bool:
    """Whether it is a torch.nn.Module, without importing torch for what is none."""
    return any(cls.__module__ == "torch.nn.modules.module" for cls in type(source).__mro__)


def _refuse(batches: Any, optimizer: Any) -> None:
    if batches is not None or optimizer is not None:
        raise TypeError("batches and an optimizer need a model: diagnose(model, batches)")


def _of_files(source: Any) -> Iterator[Finding]:
    source = _opened(source)
    if isinstance(source, Run):
        for history in histories(source):
            yield from judge("run", history)
            yield from judge("layer", history.layer)
    else:
        for layer in _layers(source):
            yield from judge("layer", layer)


def _of_copies(sources: Sequence[Any]) -> Iterator[Finding]:
    copies: dict[str, list[Layer]] = {}
    for source in sources:
        for layer in _layers(_opened(source)):
            copies.setdefault(layer.name, []).append(layer)
            yield from judge("layer", layer)
    for of_layer in copies.values():
        if len(of_layer) > 1:
            yield from judge("copies", of_layer)


def _opened(source: Any) -> Any:
    """What a path leads to: a run if it is a folder, else the path."""
    if not isinstance(source, (str, os.PathLike)):
        return source
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"there is no file or folder {path}")
    return open_run(path) if path.is_dir() or path.name == RUN else path


def _layers(source: Any) -> list[Layer]:
    if isinstance(source, Run):
        return [history.layer for history in histories(source)]
    if _is_module(source):
        from .model import model_layers

        return [layer for layer, _ in model_layers(source)]
    from .checkpoint import read_checkpoint, state_layers

    if isinstance(source, Path):
        return read_checkpoint(source)
    if isinstance(source, Mapping):
        return state_layers(source)
    raise TypeError(
        f"expected a run, a checkpoint, a state_dict or a model, or a list of them, but got {type(source).__name__}"
    )
