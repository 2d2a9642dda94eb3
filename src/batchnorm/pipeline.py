"""The pipeline under every layer: measure -> merge -> normalize, and the running statistics that follow."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import activations
from .checks import NonfiniteStatistics, check, lonely_values
from .moments import Moments, broadcast_mask
from .ops import choose, collective, native, native_sync, plain
from .ops.autograd import measure_and_normalize, normalize, normalize_measured
from .ops.choose import under_transform
from .ops.plain import Operands, Settings

__all__ = [
    "Nonfinite",
    "Operands",
    "Running",
    "Settings",
    "Tracking",
    "moments_of",
    "normalize_batch",
    "track",
    "under_transform",
]

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Nonfinite = Literal["propagate", "skip", "raise"]
Statistics = Tensor | native.Measured
"""What a call measured, in the form of the operators that measured it; `moments_of` reads either form."""


class Running(NamedTuple):
    """The running statistics, (C,) each, or None for neither."""

    mean: Tensor | None
    var: Tensor | None


class Tracking(NamedTuple):
    """How the running statistics follow the measured ones.

    Attributes:
        momentum: weight of the new value. May be a tensor, so that a cumulative average reads nothing from the device.
        unbiased: track the unbiased variance, as PyTorch does; else the biased one, as Keras does.
        nonfinite: what to do if a channel's measured statistics are not finite: track them, skip them, or raise.
    """

    momentum: float | Tensor = 0.1
    unbiased: bool = True
    nonfinite: Nonfinite = "propagate"


def normalize_batch(
    operands: Operands,
    running: Running,
    settings: Settings,
    training: bool,
    tracking: Tracking | None,
    ranks: ProcessGroup | None = None,
    renorm: tuple[float, float] | None = None,
) -> tuple[Tensor, Statistics | None]:
    """Return y as of `batch_norm`, and the measured statistics for `moments_of`, or None if nothing was measured.

    Args:
        operands, settings: what to normalize, and how.
        running: read in eval and by renorm, moved in training.
        tracking: None leaves the running statistics alone.
        ranks: measure over all these ranks' batches.
        renorm: r_max and d_max of batch renormalization.
    """
    x, _, _, residual, mask = operands
    check(operands, *running, training, settings, synchronized=ranks is not None, renormalized=renorm is not None)
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        unactivated = settings._replace(activation=activations.NONE)
        z, statistics = normalize_batch(
            operands._replace(residual=None), running, unactivated, training, tracking, ranks, renorm
        )
        return _added(z, residual, mask, settings), statistics
    alone = ranks is None and renorm is None
    if _exports() and alone and _is_standard(mask, settings, training, tracking):
        return exported(operands, running, settings, training, tracking), None
    if not training:
        return evaluate(operands, running, settings), None
    if renorm is not None:
        return train_renormalized(operands, running, settings, tracking, ranks, renorm)
    if ranks is not None:
        return train_over_ranks(operands, running, settings, tracking, ranks)
    return train_alone(operands, running, settings, tracking)


# The paths. Each is given checked operands, whose residual has x's shape and dtype.


def evaluate(operands: Operands, running: Running, settings: Settings) -> Tensor:
    """Normalized by the running statistics; nothing is measured."""
    assert running.mean is not None
    assert running.var is not None
    if settings.virtual_batch:
        settings = settings._replace(virtual_batch=0)
    if choose.serves_native(operands, settings, training=False):
        return native.infer(operands, running.mean, running.var, settings)
    return normalize(operands, running.mean, running.var, settings)


def train_alone(
    operands: Operands, running: Running, settings: Settings, tracking: Tracking | None
) -> tuple[Tensor, Statistics]:
    """Normalized by what this process measures."""
    if choose.serves_native(operands, settings, training=True):
        return _train_natively(operands, running, settings, tracking)
    y, statistics = measure_and_normalize(operands, settings)
    _follow(running, _followed(statistics, tracking), tracking)
    return y, statistics


def _train_natively(
    operands: Operands, running: Running, settings: Settings, tracking: Tracking | None
) -> tuple[Tensor, Statistics]:
    moved, momentum = _moved_by_torch(operands.x, running, tracking)
    y, measured = native.train(operands, settings, *moved, momentum)
    if moved.mean is None:
        _follow_measured(running, measured, tracking)
    return y, measured


def train_over_ranks(
    operands: Operands, running: Running, settings: Settings, tracking: Tracking | None, ranks: ProcessGroup
) -> tuple[Tensor, Statistics]:
    """Normalized by what all ranks measure together."""
    if choose.serves_native_over_ranks(operands):
        return _train_natively_over_ranks(operands, running, settings, tracking, ranks)
    statistics, followed = _measured(operands, settings, tracking, ranks)
    y = normalize_measured(operands, statistics, settings, ranks)
    _follow(running, followed, tracking)
    return y, statistics


def _train_natively_over_ranks(
    operands: Operands, running: Running, settings: Settings, tracking: Tracking | None, ranks: ProcessGroup
) -> tuple[Tensor, Statistics]:
    x = operands.x.detach()
    moved, momentum = _moved_by_torch(x, running, tracking)
    rows = native_sync.measure(x, settings.eps, ranks)
    if collective.is_lonely(rows.counts.sum().view(1, 1)):
        raise lonely_values(x)
    measured = native_sync.merge(x, rows, settings.eps, *moved, momentum)
    if moved.mean is None:
        _follow_measured(running, measured, tracking)
    return native_sync.normalize(operands, rows, measured, settings, ranks), measured


def train_renormalized(
    operands: Operands,
    running: Running,
    settings: Settings,
    tracking: Tracking | None,
    ranks: ProcessGroup | None,
    renorm: tuple[float, float],
) -> tuple[Tensor, Tensor]:
    """Batch renormalization, by what this process or all ranks measure, and by the old running statistics."""
    statistics, followed = _measured(operands, settings, tracking, ranks)
    operands = _renormalized(operands, running, statistics, settings.eps, *renorm)
    y = normalize_measured(operands, statistics, settings, ranks)
    _follow(running, followed, tracking)
    return y, statistics


def exported(
    operands: Operands, running: Running, settings: Settings, training: bool, tracking: Tracking | None
) -> Tensor:
    """The same by torch's own operator, which every exporter knows."""
    x, weight, bias, residual, mask = operands
    mean, var = running
    momentum = 0.0 if tracking is None else tracking.momentum
    assert not isinstance(momentum, Tensor)
    if not training and weight is not None and mean is not None and var is not None:
        # torch wants one dtype for all vectors
        mean, var = (t if t.dtype == weight.dtype else t.to(weight.dtype) for t in (mean, var))
    z = F.batch_norm(x, mean, var, weight, bias, training, momentum, settings.eps)
    y = settings.activation(z if residual is None else z + residual)
    return y if mask is None else torch.where(broadcast_mask(mask, x), y, 0.0)


# Their steps.


def _added(z: Tensor, residual: Tensor, mask: Tensor | None, settings: Settings) -> Tensor:
    """activation(z + residual), for a residual that the operators do not add: its shape or dtype is not x's."""
    if mask is None:
        return settings.activation(z + residual)
    mask = broadcast_mask(mask, z)  # where the mask is False, the residual too may hold anything
    return torch.where(mask, settings.activation(z + torch.where(mask, residual, 0.0)), 0.0)


def _measured(
    operands: Operands, settings: Settings, tracking: Tracking | None, ranks: ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """Statistics of the batch, over all ranks if there are any; and those that the running statistics are to track."""
    x, mask = operands.x, operands.mask
    with torch.no_grad():
        statistics = choose.steps(x).measure(x.detach(), mask)
        if ranks is not None:
            statistics = collective.merge_over(statistics, ranks)
            if mask is None and collective.is_lonely(statistics):
                raise lonely_values(x)
        return statistics, _followed(statistics, tracking)


def track(running: Running, moments: Moments, tracking: Tracking) -> Tensor:
    """Move the running statistics, in place, toward moments that were measured earlier; return these as statistics."""
    statistics = plain.statistics_of(moments.count, moments.mean, moments.m2)
    _follow(running, _followed(statistics, tracking), tracking)
    return statistics


def _moved_by_torch(x: Tensor, running: Running, tracking: Tracking | None) -> tuple[Running, float]:
    """The running statistics that torch's operators move, or none, and the momentum."""
    if tracking is None or not _is_as_torch(tracking) or not native.moves(running.mean, x):
        return Running(None, None), 0.0
    return running, float(tracking.momentum)


def _follow_measured(running: Running, measured: native.Measured, tracking: Tracking | None) -> None:
    if tracking is not None and running.mean is not None:
        _follow(running, _followed(measured.statistics(), tracking), tracking)


def _follow(running: Running, statistics: Tensor, tracking: Tracking | None) -> None:
    mean, var = running
    if tracking is None or mean is None or var is None:
        return
    # A momentum that is a tensor must not be read while the call is traced, and vmap may have batched the running
    # statistics.
    steps = plain if isinstance(tracking.momentum, Tensor) else choose.steps(statistics)
    steps.track(mean, var, statistics, tracking.momentum, tracking.unbiased, tracking.nonfinite == "skip")


def moments_of(statistics: Statistics) -> Moments:
    """The Moments of what a call measured: of all its virtual batches, or ranks, together."""
    count, mean, m2 = (statistics if isinstance(statistics, Tensor) else statistics.statistics()).unbind()
    moments = Moments(count, mean, m2)
    if mean.dim() == 2:
        moments = moments.merged()
    return Moments(moments.count[:1].sum().to(torch.int64), moments.mean, moments.m2)


def _merged(statistics: Tensor) -> Tensor:
    """Statistics of the union of virtual batches: (3, G, C) to (3, C)."""
    union = Moments(*statistics).merged()
    return plain.statistics_of(union.count, union.mean, union.m2)


def _followed(statistics: Tensor, tracking: Tracking | None) -> Tensor:
    """The statistics to track, (3, C). With nonfinite="raise" it raises before anything has moved."""
    if tracking is None:
        return statistics
    if statistics.dim() == 3:
        statistics = _merged(statistics)
    if tracking.nonfinite == "raise":
        _, mean, m2 = statistics
        broken = (~(mean.isfinite() & m2.isfinite())).nonzero().flatten().tolist()
        if broken:
            raise NonfiniteStatistics(
                f"the batch has NaN or infinite statistics in {len(broken)} of {mean.numel()} channels (the first: "
                f"{broken[:5]}); the running statistics have not changed. Look for an earlier layer that "
                'overflows, or continue with nonfinite="skip"'
            )
    return statistics


def _renormalized(
    operands: Operands, running: Running, statistics: Tensor, eps: float, r_max: float, d_max: float
) -> Operands:
    """Batch renormalization as a change of weight and bias: xhat * r + d in place of xhat, r and d held constant.

    r = clip(sigma / sigma_running, 1 / r_max, r_max);  d = clip((mean - mean_running) / sigma_running, -d_max, d_max)
    """
    assert running.mean is not None
    assert running.var is not None
    mean, rstd = statistics[1], plain.Statistics(*statistics).rstd(eps)
    rstd_running = torch.rsqrt(running.var.double() + eps)
    r = (rstd_running / rstd).clamp(1 / r_max, r_max)
    d = ((mean - running.mean.double()) * rstd_running).clamp(-d_max, d_max)
    x, weight, bias, *_ = operands
    dtype = torch.promote_types(x.dtype if weight is None else weight.dtype, torch.float32)
    gamma = torch.ones_like(r) if weight is None else weight.double()
    beta = torch.zeros_like(r) if bias is None else bias.double()
    return operands._replace(weight=(gamma * r).to(dtype), bias=(gamma * d + beta).to(dtype))


def _exports() -> bool:
    """Whether the model is being exported for a program that does not have our operators."""
    tracing = torch._C._get_tracing_state() is not None  # torch.jit's, and so ONNX's older exporter's too
    # The value of torch.compiler.is_exporting(); up to torch 2.11, torch.compile treats a call of it as True.
    return tracing or torch.compiler._is_exporting_flag


def _is_standard(mask: Tensor | None, settings: Settings, training: bool, tracking: Tracking | None) -> bool:
    """Whether torch's own operator computes this."""
    usual = tracking is None or _is_as_torch(tracking)
    return usual and not (training and (mask is not None or settings.virtual_batch))


def _is_as_torch(tracking: Tracking) -> bool:
    """Whether torch's own operator moves the running statistics in this way."""
    return not isinstance(tracking.momentum, Tensor) and tracking.unbiased and tracking.nonfinite == "propagate"
