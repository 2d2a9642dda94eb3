"""merge_statistics() and average(): merge the running statistics of several models, or average the models."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..moments import Moments
from .states import State, as_given, can_be_averaged, copied, equal, kind_of, read


def merge_statistics(
    models: Iterable[nn.Module | State], counts: Sequence[int] | None = None, *, unbiased: bool = True
) -> dict[str, Any]:
    """Merge the running statistics of several models into those of one model that has seen all their data.

        mean = sum n_i mean_i / n;  var = (sum n_i (var_i + (mean_i - mean)^2)) / n         (law of total variance)

    where var_i and var are the biased variances: (n_i - 1) / n_i of what running_var holds. Averaging buffers gives the
    mean of the variances, which lacks the spread between the means: it is too small whenever the models have seen
    different data.

    Merging is exact for the same weights on disjoint data (ranks, shards, clients before training). Different weights
    have different activations, so merge their statistics only if there is no data to `recalibrate` with.

    Args:
        models: modules, or state_dicts, of tensors or NumPy arrays; of one architecture. Do not pass one module into
            which several checkpoints are loaded in turn: it has a single state. Every layer with running_mean and
            running_var is merged, instance normalization too. The models are not changed.
        counts: values per channel behind each model's statistics, samples times positions. 0 leaves a model out. None:
            equal weights, and variances as they are, as if each came from very many values.
        unbiased: whether the running variances are unbiased, as PyTorch's; False: biased, as Keras's.

    Returns:
        running_mean, running_var and num_batches_tracked of every layer, by their names in the state_dict, new tensors,
        or arrays where the first model has those: for `model.load_state_dict(merged, strict=False)`.
        num_batches_tracked is the largest: a sum would grow without bound where models are merged, trained on and
        merged again.

    Warns:
        UserWarning: there is nothing to merge.

    Raises:
        ValueError: no models; models whose layers or channels differ; a wrong number of counts; negative counts, or all
            0.
        TypeError: a list of arrays, which has no names.

    Source: Chan, Golub & LeVeque 1979, by `Moments`.

    Example:
        >>> here, there = nn.BatchNorm1d(1), nn.BatchNorm1d(1)
        >>> x = torch.tensor([[1.0], [2.0], [3.0], [6.0], [13.0]])
        >>> for layer, part in ((here, x[:3]), (there, x[3:])):
        ...     result = bn.recalibrate(layer, [part])
        >>> merged = bn.merge_statistics([here, there], counts=[3, 2])
        >>> merged["running_mean"].item(), merged["running_var"].item(), x.var().item()
        (5.0, 23.5, 23.5)
    """
    given, states = read(models)
    weights = _weights(len(states), counts, "counts")
    if counts is not None and not all(float(n).is_integer() for n in counts):
        raise ValueError(
            f"counts must be whole numbers of values, but got {list(counts)}; pass relative weights to average()"
        )
    merged = _merged_statistics(states, weights, unbiased and counts is not None)
    if not merged:
        warnings.warn("nothing to merge: no layer of the models has both running_mean and running_var", stacklevel=2)
    return as_given(merged, given[0])


def average(models: Iterable[nn.Module | State], weights: Sequence[float] | None = None) -> dict[str, Any]:
    """Return the state_dict of the average of several models: checkpoints, model soups, clients of federated learning.

        parameter = sum w_i parameter_i / sum w_i

    Parameters and floating-point buffers are averaged in float64 and rounded once. Running statistics are merged by the
    law of total variance (`merge_statistics`), because an average lacks the spread between the models.
    num_batches_tracked is the largest. Other integers, booleans, and entries other than tensors or arrays cannot be
    averaged; the last model's are taken.

    Averaged weights have new activations, whose statistics cannot be merged from others: `recalibrate` the averaged
    model if you have data. The merged statistics are for the case without data. For checkpoints that have seen the same
    data they are somewhat too wide, as is the mean of the variances.

    Args:
        models: modules, or state_dicts, as for `merge_statistics`. They are not changed.
        weights: not negative, not all 0, for example the samples seen by each client. None for equal weights.

    Returns:
        A state_dict with the first model's keys, dtypes and devices, for `model.load_state_dict(averaged)`. It has
        NumPy arrays if the first model has.

    Warns:
        UserWarning: the models differ in entries that are taken from the last model; it says which, and their types.

    Raises:
        ValueError: no models; models whose entries or shapes differ; a wrong number of weights; negative weights, or
            all 0.
        TypeError: a list of arrays, which has no names.

    Source: McMahan et al. 2017, "Communication-efficient learning of deep networks from decentralized data".

    Example:
        >>> first, second = (nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)) for _ in range(2))
        >>> averaged = bn.average([first, second], weights=[3, 1])
        >>> torch.allclose(averaged["0.bias"], 0.75 * first[0].bias + 0.25 * second[0].bias)
        True
        >>> first.load_state_dict(averaged)
        <All keys matched successfully>
    """
    given, states = read(models)
    shares = _weights(len(states), weights, "weights")
    _require_same([set(state) for state in states])
    merged = _merged_statistics(states, shares, unbiased=False)
    last = [name for name in states[0] if name not in merged and not can_be_averaged(states[0][name])]
    rest = {name: _average(name, states, shares) for name in states[0] if name not in (*merged, *last)}
    for name in last:
        if isinstance(states[0][name], Tensor):
            _require_one_shape(name, states)
    differing = [name for name in last if not all(equal(state[name], states[-1][name]) for state in states)]
    if differing:
        kinds = ", ".join(f"{name} ({kind_of(given[0][name])})" for name in differing)
        warnings.warn(
            f"entries that cannot be averaged differ between the models; the last model's are taken: {kinds}",
            stacklevel=2,
        )
    results = {**merged, **rest, **{name: copied(states[-1][name]) for name in last}}
    return as_given({name: results[name] for name in states[0]}, given[0])


def _require_same(names: list[set[str]]) -> None:
    differing = sorted(set.union(*names) - set.intersection(*names))
    if differing:
        raise ValueError(f"expected models of one architecture, but {', '.join(differing[:5])} are not in all of them")


def _weights(models: int, weights: Sequence[float] | None, what: str) -> Tensor:
    """(models, 1), float64; they sum to at least 1, below which Moments would take them for no samples."""
    given = torch.ones(models, dtype=torch.float64) if weights is None else torch.tensor(weights, dtype=torch.float64)
    if len(given) != models:
        raise ValueError(f"expected {models} {what}, one per model, but got {len(given)}")
    if not (given.isfinite().all() and (given >= 0).all() and given.sum() > 0):
        raise ValueError(f"{what} must not be negative, nor all 0, but got {given.tolist()}")
    return (given if what == "counts" else given / given.sum())[:, None]


def _merged_statistics(states: list[State], weights: Tensor, unbiased: bool) -> dict[str, Tensor]:
    merged: dict[str, Tensor] = {}
    tracking = [{name for name in state if name.rpartition(".")[2] == "running_mean"} for state in states]
    _require_same(tracking)
    first, counting = states[0], (weights > 0).flatten()
    states, weights = [state for state, counts in zip(states, counting, strict=True) if counts], weights[counting]
    for name in first:
        prefix, dot, last = name.rpartition(".")
        layer = prefix + dot
        if last != "running_mean" or not isinstance(first.get(f"{layer}running_var"), Tensor):
            continue
        means, variances = (_same(states, f"{layer}{of}") for of in ("running_mean", "running_var"))
        missing = 1 if unbiased else 0
        moments = Moments(weights, means, variances * (weights - missing).clamp(min=0)).merged()
        if not (moments.count > missing).all():
            raise ValueError("counts must sum to at least 2, because one value has no variance")
        for of, value in (("running_mean", moments.mean), ("running_var", moments.variance(unbiased))):
            merged[f"{layer}{of}"] = value.to(first[f"{layer}{of}"])
        tracked = f"{layer}num_batches_tracked"
        if isinstance(first.get(tracked), Tensor):
            merged[tracked] = _same(states, tracked).amax(0).to(first[tracked])
    return merged


def _same(states: list[State], name: str) -> Tensor:
    """The entry of all states, stacked, float64 on the CPU."""
    _require_one_shape(name, states)
    return torch.stack([state[name].detach().to("cpu", torch.float64) for state in states])


def _require_one_shape(name: str, states: list[State]) -> None:
    found = [state.get(name) for state in states]
    shapes = [tuple(value.shape) if isinstance(value, Tensor) else None for value in found]
    if len(set(shapes)) > 1:
        raise ValueError(f"{name} must have one shape in all models, but got {shapes}")


def _average(name: str, states: list[State], shares: Tensor) -> Tensor:
    _require_one_shape(name, states)
    first = states[0][name]
    total = torch.zeros_like(first, dtype=torch.promote_types(first.dtype, torch.float64))
    for state, share in zip(states, shares.flatten().tolist(), strict=True):
        if share:
            total += state[name].detach().to(total) * share
    return total.to(first.dtype)
