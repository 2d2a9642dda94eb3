"""adapt(): fit batch norm to data unlike the training data, without labels; can be undone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ..mixin import BatchNorm
from ..model.run import Call, each_of, unwrapped
from ..model.run import call as run_model
from .drift import Recalibration
from .population import Ranks, Saved, layers_of, measuring
from .recalibrate import require_repeatable, update_statistics

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# SAR's recovery: a moving average of the entropy below 0.2 of ln 1000 at most, on 1000 classes, is a collapse.
_RELIABLE, _COLLAPSED, _MEMORY = 0.4, 0.2 / math.log(1000), 0.9


@dataclass(frozen=True)
class Adaptation(Recalibration):
    """What `adapt` did: a `Recalibration`, and how the entropy of the predictions changed.

    Attributes:
        entropy: mean entropy of the predictions on each batch, before the step on that batch, in nats.
        resets: how often gamma and beta were put back because the predictions were collapsing.
    """

    entropy: list[float] = field(default_factory=list)
    resets: int = 0

    def to_dict(self) -> dict[str, Any]:
        """What json can write."""
        return {**super().to_dict(), "entropy": self.entropy, "resets": self.resets}


def adapt(
    model: nn.Module,
    batches: Iterable[Any],
    method: Literal["statistics", "blend", "entropy"] = "statistics",
    *,
    call: Call | None = None,
    max_batches: int | None = None,
    exact: bool = False,
    prior: float = 16.0,
    lr: float = 1e-3,
    epochs: int = 1,
    sync: bool = True,
    process_group: ProcessGroup | None = None,
) -> Adaptation:
    """Fit batch norm, in place, to data unlike the training data. Labels are not needed.

    - "statistics" (AdaBN): the running statistics become those of these batches. Needs some hundreds of samples.
    - "blend": for few samples: with n of them,
      running = prior / (prior + n) * running + n / (prior + n) * measured, for mean and variance separately.
    - "entropy" (TENT): only gamma and beta learn, to make the predictions certain: Adam minimizes the mean entropy of
      softmax(model output) while each layer normalizes with the batch; then the running statistics are measured for
      eval. Two guards from later work: only predictions with less than 0.4 of the largest possible entropy are learned
      from (EATA); and if the moving average (0.9) of their entropy falls below 0.029 of the largest, where all inputs
      are predicted as one class, gamma and beta are reset and learning starts again (SAR: 0.2 nats of ln 1000). The
      guards make a collapse rarer, not impossible: keep lr small, and check `entropy` and a few labels.

    As in `recalibrate`, which does the measuring, frozen layers are left alone and dropout is off. Modes, gradients and
    requires_grad are restored; if anything raises, so are parameters and running statistics.

    Args:
        model: any module; for "entropy" one whose output is logits, (N, classes, *).
        batches: as for `recalibrate`. "entropy" and `exact` need several passes, so pass a list or DataLoader, not an
            iterator.
        method: see above.
        call: `call(model, batch)`, for other kinds of batches; for "entropy" it returns the logits.
        max_batches: the largest number of batches to use.
        exact: as for `recalibrate`.
        prior: for "blend": how many samples the existing statistics count as. A larger prior trusts the new data less.
        lr: for "entropy": Adam's learning rate.
        epochs: for "entropy": number of passes of training steps over the batches.
        sync, process_group: as for `recalibrate`; "entropy" does not average gradients over ranks, so on several ranks
            it needs sync=False.

    Returns:
        The table of `recalibrate`, `entropy` and `resets`; its `undo()` restores parameters and running statistics, bit
        for bit.

    Raises:
        ValueError: an unknown method, no batches, no gamma and beta to learn, or logits of a wrong shape.
        RuntimeError: predictions or statistics that are not finite.
        NotImplementedError: "entropy" on several ranks.

    Source: Li et al. 2016, "Revisiting batch normalization for practical domain adaptation" (statistics). Schneider et
        al. 2020, "Improving robustness against common corruptions by covariate shift adaptation" (blend). Wang et al.
        2021, "Tent: fully test-time adaptation by entropy minimization". Niu et al. 2022, "Efficient test-time model
        adaptation without forgetting" (EATA), and 2023, "Towards stable test-time adaptation in dynamic wild world"
        (SAR).

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).eval()
        >>> darker = torch.randn(64, 4) - 3
        >>> before = model(darker)
        >>> adaptation = bn.adapt(model, [darker])
        >>> bool(model(darker).mean().abs() < 1e-5)
        True
        >>> adaptation.undo()
        >>> torch.equal(model(darker), before)
        True
    """
    if method not in ("statistics", "blend", "entropy"):
        raise ValueError(f'method must be "statistics", "blend" or "entropy", but got {method!r}')
    if not (prior >= 0 and lr > 0 and epochs >= 1):
        raise ValueError(f"expected prior >= 0, lr > 0 and epochs >= 1, but got {prior}, {lr} and {epochs}")
    model, ranks = unwrapped(model), Ranks(sync, process_group)
    saved = Saved(layers_of(model)[0].values(), parameters=True)
    entropy, resets = [], 0
    try:
        if method == "entropy":
            require_repeatable(batches, 'method="entropy"')
            if ranks.several():
                raise NotImplementedError("entropy does not average gradients over ranks; pass sync=False")
            entropy, resets = _minimize_entropy(model, batches, call or run_model, max_batches, lr, epochs)
        weight = prior if method == "blend" else 0.0
        done = update_statistics(model, batches, call, max_batches, exact, False, ranks, weight)
    except BaseException:
        saved.restore()
        raise
    return Adaptation(done.layers, done.passes, saved, entropy, resets)


def _minimize_entropy(
    model: nn.Module, batches: Iterable[Any], call: Call, max_batches: int | None, lr: float, epochs: int
) -> tuple[list[float], int]:
    """Let gamma and beta learn; return the entropy of each batch, and how often they were reset."""
    layers = list(layers_of(model)[0].values())
    learned = _learned(layers)
    if not learned:
        raise ValueError(
            "the model needs a batch norm with gamma or beta that is not frozen, but has none: unfreeze the model"
        )
    start = [parameter.detach().clone() for parameter in learned]
    entropy: list[float] = []
    resets, average = 0, None
    with torch.enable_grad(), measuring(model, layers, by_batch=True), _learning(model, learned):
        optimizer = torch.optim.Adam(learned, lr)
        for _ in range(epochs):
            for batch in each_of(batches, max_batches):
                each, largest = _entropy(call(model, batch))
                entropy.append(each.mean().item())
                reliable = each[each.detach() < _RELIABLE * largest]
                if not len(reliable):
                    continue
                optimizer.zero_grad()
                loss = reliable.mean()
                loss.backward()
                optimizer.step()
                average = loss.item() if average is None else _MEMORY * average + (1 - _MEMORY) * loss.item()
                if average < _COLLAPSED * largest:
                    with torch.no_grad():
                        for parameter, value in zip(learned, start, strict=True):
                            parameter.copy_(value)
                    optimizer, average, resets = torch.optim.Adam(learned, lr), None, resets + 1
    return entropy, resets


def _learned(layers: list[BatchNorm]) -> list[Tensor]:
    """Gamma and beta of the layers, each once, without the frozen ones."""
    learned = {}
    for layer in layers:
        if "affine" not in getattr(layer, "frozen", ()):
            learned.update({id(p): p for p in layer.parameters()})
    return list(learned.values())


@contextmanager
def _learning(model: nn.Module, learned: list[Tensor]) -> Iterator[None]:
    """Let only these parameters require a gradient in the block; restore everything at its end, gradients too."""
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    try:
        for parameter, _, _ in before:
            parameter.requires_grad_(False)
        for parameter in learned:
            parameter.requires_grad_(True)
            parameter.grad = None
        yield
    finally:
        for parameter, required, gradient in before:
            parameter.requires_grad_(required)
            parameter.grad = gradient


def _entropy(logits: Any) -> tuple[Tensor, float]:
    """Entropy of each prediction, in nats, and the largest possible one."""
    if not isinstance(logits, Tensor) or logits.dim() < 2 or logits.size(1) < 2:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(
            f"expected logits of shape (N, classes, *) of at least 2 classes, but got {got}; pass call= to get them"
        )
    log_probability = logits.float().log_softmax(1)
    each = -(log_probability.exp() * log_probability).sum(1).flatten()
    if not each.isfinite().all():
        raise RuntimeError("the predictions are not finite; look for NaN in the batch, or lower lr")
    return each, math.log(logits.size(1))
