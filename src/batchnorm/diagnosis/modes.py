"""compare_modes(): how much worse a model is in eval mode than in train mode, and what recalibrating would mend."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..model.run import Call, each_of, undisturbed_random_state, unwrapped
from ..model.run import call as run_model
from ..table import Table
from ..tools.drift import Drift, Recalibration
from ..tools.population import layers_of, measuring
from ..tools.recalibrate import recalibrate, require_repeatable
from ..view.facts import plain
from .measure import Loss, target_of


@dataclass(frozen=True)
class Comparison(Table):
    """The loss of a model in each mode, and how far each layer's running statistics are from what was measured.

    Printed, and in a notebook, a table.

    Attributes:
        train_loss: batch-norm layers normalize with each batch, as in training; everything else as in eval, so that
            dropout does not blur the comparison.
        eval_loss: in eval mode, as the model is.
        recalibrated_loss: in eval mode after `recalibrate` on the same batches.
        batches: how many.
        layers: a `Drift` a layer.
    """

    _columns, _numbers = Recalibration._columns, Recalibration._numbers

    train_loss: float
    eval_loss: float
    recalibrated_loss: float
    batches: int
    layers: list[Drift]
    _table: Recalibration

    def to_dict(self) -> dict[str, Any]:
        """What JSON can write: a loss that is not finite becomes None."""
        losses = {name: getattr(self, name) for name in ("train_loss", "eval_loss", "recalibrated_loss", "batches")}
        return plain({**losses, "layers": [drift.to_dict() for drift in self.layers]})

    @property
    def headline(self) -> str:
        """The losses in one sentence."""
        return (
            f"loss over {self.batches} batches: {self.train_loss:.4g} in train mode, {self.eval_loss:.4g} in eval mode"
            f", {self.recalibrated_loss:.4g} in eval mode if recalibrated"
        )

    def _cells(self) -> Iterable[tuple[str, ...]]:
        return self._table._cells()


def compare_modes(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Loss,
    *,
    call: Call | None = None,
    max_batches: int | None = None,
) -> Comparison:
    """Compare the loss in train mode, in eval mode, and in eval mode after a trial recalibration (undone afterwards).

    If eval mode is worse than train mode and recalibration fixes it, the running statistics were wrong. If it does not,
    the batches differ from each other or from the whole data, as small batches do, and the model relies on that.

    The model is restored, also if anything raises.

    Args:
        model: torch.nn's batch-norm layers or ours; frozen layers normalize with their running statistics throughout.
        batches: of (input, ..., target), or anything that `loss` and `call` understand; needs three passes.
        loss: `loss(output, target)`, the mean over the batch; the target is the last entry of a tuple, else the batch.
        call: `call(model, batch)`, as in `recalibrate`.
        max_batches: the largest number of batches to use.

    Raises:
        ValueError: no batches, or an iterator, which allows only one pass.

    Example:
        >>> model = nn.Sequential(nn.BatchNorm1d(1), nn.Linear(1, 1))
        >>> x = torch.tensor([[10.0], [12.0], [17.0]])
        >>> result = bn.compare_modes(model, [(x, x)], lambda output, target: (output - output.mean()).square().mean())
        >>> result.eval_loss > 2 * result.train_loss, model[0].running_mean.item()
        (True, 0.0)
    """
    require_repeatable(batches, "compare_modes")
    model = unwrapped(model)
    layers = layers_of(model)[0].values()

    def mean_loss(by_batch: Iterable[Any]) -> tuple[float, int]:
        with torch.no_grad(), measuring(model, by_batch, by_batch=True):
            return _mean_loss(model, each_of(batches, max_batches), loss, call or run_model)

    with undisturbed_random_state(model):
        train_loss, seen = mean_loss(layers)
        eval_loss, _ = mean_loss(())
        result = recalibrate(model, batches, call=call, max_batches=max_batches)
        try:
            recalibrated_loss, _ = mean_loss(())
        finally:
            result.undo()
    return Comparison(train_loss, eval_loss, recalibrated_loss, seen, result.layers, result)


def _mean_loss(model: nn.Module, batches: Iterable[Any], loss: Loss, call: Call) -> tuple[float, int]:
    """Over all items of the batches, a short one weighs as much as it has; and how many batches there were."""
    total, items, seen = 0.0, 0, 0
    for batch in batches:
        size = _items(batch)
        total += float(loss(call(model, batch), target_of(batch))) * size
        items += size
        seen += 1
    if not items:
        raise ValueError("expected at least one batch, but there was none")
    return total / items, seen


def _items(batch: Any) -> int:
    """How many items a batch has, by the first tensor in it; 1 where there is none."""
    if isinstance(batch, Tensor):
        return batch.size(0) if batch.dim() else 1
    values = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, (tuple, list)) else ()
    return next((_items(value) for value in values if isinstance(value, (Tensor, dict, tuple, list))), 1)
