"""diagnose(): hands what it is given to the rules that can judge it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

import numpy as np

from ..runs.reader import Run, open_run
from ..runs.schema import RUN
from ..view.facts import plural, some
from .finding import Finding
from .findings import Findings
from .history import histories
from .judged import judged
from .layer import USUAL, Layer
from .measured import Inputs
from .rules import SETTLED, judge
from .rules.preprocessing import inputs_of

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
    """Find what is wrong with a model's batch normalization: the fault, its layer, the evidence, and the remedy.

    The more you pass, the more it can find:

    - a checkpoint (a .safetensors file, or one of tensors that torch.save wrote) or a state_dict: values. No code of
      the model is needed, and nothing is unpickled.
    - a run, a folder that `watch` wrote or what `open_run` returned: what happened in training. torch is not imported.
    - a model: values, settings, modes, neighbors. It is not run.
    - a model and batches: what they measure. The model runs in train mode without dropout; its buffers, modes,
      gradients and random state are restored, also if it raises.
    - a list of any of these: each is judged, and, if they are ranks of one training, whether they agree.

    Args:
        source: any of the above.
        batches: tensors, tuples that begin with the input, or dicts of keyword arguments, as a DataLoader gives them.
        loss: `loss(output, target)`, one number; the target is the last entry of a tuple, else the whole batch. It
            allows comparing train mode with eval mode, as in `compare_modes`, and running a backward.
        call: `call(model, batch)`, how the model is run on a batch; by default model(x), or model(**batch) of a dict.
        optimizer: the model's, to check for weight decay on gamma and beta.
        max_batches: the largest number of batches to measure; None for all.

    Returns:
        A list of `Finding`, worst first. Printed, it is a report. Its `judged` says how many layers, steps and batches
        were judged, by which rules, and what could not be judged.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: a file that is not a checkpoint or holds objects other than tensors; a folder without a run; a model
            or checkpoint without batch norm; no batches.
        TypeError: anything other than the above, or batches without a model.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, momentum=0.99), nn.ReLU())
        >>> findings = bn.diagnose(model)
        >>> for finding in findings:
        ...     print(finding.severity, finding.rule, finding.layer, finding.remedy)
        serious momentum 1 model.get_submodule('1').momentum = 0.01
        note bias 1 model.get_submodule('0').bias = None  # before training
        >>> findings.judged.layers, findings.judged.batches, findings.judged.missed[0]
        (1, None, 'eval-gap needs batches with loss=')
    """
    with np.errstate(all="ignore"):  # what is not finite is data here
        case = _Case()
        several = isinstance(source, (list, tuple))
        if several or not _is_module(source):
            if batches is not None or optimizer is not None:
                raise TypeError(
                    "batches and optimizer need a model, but the source is none: call diagnose(model, batches)"
                )
            if several:
                _compare(case, source)
            else:
                _take(case, source)
            return case.findings()
        from .model import model_layers

        layers = model_layers(source, optimizer)  # pyright: ignore[reportArgumentType]
        case.take(
            [layer for layer, _ in layers], "values", "settings", "place", *["optimizer"] * (optimizer is not None)
        )
        if batches is not None:
            _run(case, source, layers, batches, call, loss, max_batches)
        return case.findings()


class _Case:
    """What has been found so far, how much was judged, and what could not be."""

    def __init__(self) -> None:
        self.found: list[Finding] = []
        self.known: set[str] = set()
        self.missed: list[str] = []
        self.layers = 0
        self.steps: int | None = None
        self.batches: int | None = None
        self.nothing = False  # in one of the sources

    def judge(self, kind: str, *evidence: object, source: str | None = None) -> None:
        """Let all rules judge evidence of that kind."""
        self.found += [replace(each, sources=(source,)) if source else each for each in judge(kind, *evidence)]

    def take(self, layers: Sequence[Layer], *known: str, source: str | None = None) -> None:
        """Judge layers as they stand, of which so much is known."""
        self.known.update(known)
        self.layers += len(layers)
        for layer in layers:
            self.judge("layer", layer, source=source)

    def miss(self, what: str, source: str | None = None) -> None:
        """Note what could not be judged and why."""
        self.missed.append(f"{source}: {what}" if source else what)

    def findings(self) -> Findings:
        return Findings(
            self.found, judged(self.known, self.layers, self.steps, self.batches, self.missed, self.nothing)
        )


def _take(case: _Case, source: Any, name: str | None = None) -> list[Layer]:
    """Judge one of what `diagnose` can be given, without running it; returns its layers."""
    source = _opened(source)
    if isinstance(source, Run):
        return _take_run(case, source, name)
    if _is_module(source):
        from .model import model_layers

        layers = [layer for layer, _ in model_layers(source)]
        case.take(layers, "values", "settings", "place", source=name)
        return layers
    from .checkpoint import read_checkpoint, state_layers

    if isinstance(source, Path):
        layers = read_checkpoint(source)
    elif isinstance(source, Mapping):
        layers = state_layers(source)
    else:
        raise TypeError(
            f"expected a run, a checkpoint, a state_dict or a model, or a list of them, but got {type(source).__name__}"
        )
    case.take(layers, "values", source=name)
    case.miss(
        "eps and momentum, which a checkpoint does not hold; PyTorch's defaults are assumed, "
        f"{USUAL.eps:g} and {USUAL.momentum:g}",
        name,
    )
    return layers


def _take_run(case: _Case, run: Run, name: str | None) -> list[Layer]:
    of_layers = histories(run)
    case.steps = (case.steps or 0) + len(run.main.steps)
    if not of_layers:
        case.nothing = True
        layers = plural(len(run.main.layers), "layer")
        case.miss(f"the run, which has {layers} and {plural(len(run.main.steps), 'recorded step')}", name)
        return []
    for line in run.main.damage:
        case.miss(line, name)
    for words, missing in (
        ("of which no whole vectors were kept", [h.info.name for h in of_layers if not h.has_vectors]),
        ("which never ran in train mode", [h.info.name for h in of_layers if not h.forwards.any()]),
    ):
        if missing:
            case.miss(f"{plural(len(missing), 'layer')} {words}: {some(missing)}", name)
    for history in of_layers:
        case.judge("run", history, source=name)
    layers = [history.layer for history in of_layers]
    case.take(layers, "values", "settings", "run", source=name)
    return layers


def _compare(case: _Case, sources: Sequence[Any]) -> None:
    """Judge each of several sources, and whether layers of one name are copies of one another."""
    copies: dict[str, list[Layer]] = {}
    for i, source in enumerate(sources):
        name = str(source) if isinstance(source, (str, os.PathLike)) else f"number {i + 1}"
        if isinstance(source, Run):
            name = str(source.path)
        for layer in _take(case, source, name if len(sources) > 1 else None):
            copies.setdefault(layer.name, []).append(layer)
    for name, of_layer in copies.items():
        if len(of_layer) < 2:
            continue
        if len({layer.channels for layer in of_layer}) > 1:
            case.miss(f"whether {name} agrees, because its number of channels differs between the sources")
        elif len({layer.step for layer in of_layer}) > 1:
            case.miss(f"whether {name} agrees, because the runs recorded its last vectors at different steps")
        else:
            case.known.add("copies")
            case.judge("copies", of_layer)


def _run(case: _Case, model: Any, layers: Any, batches: Any, call: Any, loss: Any, max_batches: int | None) -> None:
    """Judge what batches measure in a model."""
    from ..model.run import unwrapped
    from .measure import measure
    from .modes import compare_modes

    batches = batches if not isinstance(batches, Iterator) else list(islice(batches, max_batches))
    measured = measure(unwrapped(model), layers, batches, call, loss, max_batches)
    inputs = next((inputs_of(*each) for each in measured if each[1].order == 0), Inputs())
    measured = [(layer, replace(of_layer, inputs=inputs)) for layer, of_layer in measured]
    settled = {layer.name for layer, of_layer in measured if of_layer.batches}
    case.found = [each for each in case.found if not (each.rule in SETTLED and each.layer in settled)]
    case.known.add("measured")
    case.batches = max((of_layer.batches + of_layer.lonely for _, of_layer in measured), default=0)
    for layer, of_layer in measured:
        case.judge("measured", layer, of_layer)
    left = [layer.name for layer, _ in layers if layer.name not in {known.name for known, _ in measured}]
    if left:
        case.miss(f"what batches measure in {some(left)}: frozen, in eval mode, without tracking, or did not run")
    if loss is None:
        return
    # Before training, eval mode is worse: nothing is wrong with that.
    if not measured:
        case.miss("the loss of both modes: no layer was measured")
    elif all(layer.is_new for layer, _ in measured):
        case.miss("the loss of both modes: no layer that ran has been trained")
    elif not any(of_layer.batches for _, of_layer in measured):
        case.miss("the loss of both modes: batches of one value a channel each cannot be run in train mode")
    else:
        case.known.add("modes")
        case.judge("modes", compare_modes(model, batches, loss, call=call, max_batches=max_batches), inputs)


def _is_module(source: Any) -> bool:
    """Whether it is a torch.nn.Module, without importing torch for what is none."""
    return any(cls.__module__ == "torch.nn.modules.module" for cls in type(source).__mro__)


def _opened(source: Any) -> Any:
    """What a path leads to: a run if it is a folder, else the path."""
    if not isinstance(source, (str, os.PathLike)):
        return source
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"there is no file or folder {path}")
    return open_run(path) if path.is_dir() or path.name == RUN else path
