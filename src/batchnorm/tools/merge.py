"""merge_statistics() and average(): the running statistics of several models as one, and the models themselves."""

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
    """The running statistics of several models as those of one that has seen all their data.

        mean = sum n_i mean_i / n;  var = (sum n_i (var_i + (mean_i - mean)^2)) / n         (law of total variance)

    where var_i and var are the biased variances: (n_i - 1) / n_i of what running_var holds. The mean of the variances,
    which is what averaging buffers gives, leaves out the spread of the means: it is too small whenever the models have
    seen different data.

    Merging statistics of the same weights on disjoint data (ranks, shards, clients before training) is exact. Those of
    weights that differ are of activations that differ too: merge them where there is no data to `recalibrate` with.

    Args:
        models: modules, or state_dicts, of tensors or NumPy arrays; of one architecture. Not one module that is loaded
            over and over: of that there is one state only. Whatever tracks a running_mean and running_var counts,
            instance normalization too. Nothing of them is changed.
        counts: over how many values a channel each model's statistics are: samples times positions. 0 leaves a model
            out. None: equal weights, and variances taken as they are, as if each were of very many values.
        unbiased: whether the running variances are unbiased, as PyTorch's; False: biased, as Keras's.

    Returns:
        running_mean, running_var and num_batches_tracked of every layer, by their names in the state_dict, new tensors,
        or arrays where the first model has those: for `model.load_state_dict(merged, strict=False)`.
        num_batches_tracked is the largest: a sum would grow without bound where models are merged, trained on and
        merged again.

    Warns:
        UserWarning: there is nothing to merge.

    Raises:
        ValueError: no models; models with other layers or channels; counts that are not as many, or negative, or all 0.
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
            f"counts are whole numbers of values, but got {list(counts)}; relative weights go to average()"
        )
    merged = _merged_statistics(states, weights, unbiased and counts is not None)
    if not merged:
        warnings.warn(
            "there are no statistics to merge: the models have no running_mean beside a running_var", stacklevel=2
        )
    return as_given(merged, given[0])


def average(models: Iterable[nn.Module | State], weights: Sequence[float] | None = None) -> dict[str, Any]:
    """The state_dict of the average of several models: of weights, ensembles' soups, clients of federated learning.

        parameter = sum w_i parameter_i / sum w_i

    Each kind of entry is treated as what it is: parameters and floating-point buffers are averaged in float64 before
    the one rounding; running statistics are merged by the law of total variance (`merge_statistics`), for averaging
    would lose the spread between the models; num_batches_tracked is the largest; other integers, booleans and whatever
    is no tensor or array cannot be averaged, and are the last model's.

    The average of weights has activations of its own, whose statistics no merging of others gives: after it
    `recalibrate` wherever there is data. The merged ones are for where there is none; of checkpoints that have seen the
    same data they are somewhat too wide, as the mean of the variances is.

    Args:
        models: modules, or state_dicts, as of `merge_statistics`. Nothing of them is changed.
        weights: not negative, not all 0; None for equal ones. Samples seen by each client, say.

    Returns:
        A state_dict with the first model's keys, dtypes and devices, for `model.load_state_dict(averaged)`. Where the
        first model has NumPy's arrays, so has this.

    Warns:
        UserWarning: entries that are the last model's, where the models differ: which, and of what type.

    Raises:
        ValueError: no models; models with other entries or shapes; weights that are not as many, negative, or all 0.
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
        warnings.warn(f"not averaged, but the last model's, though the models differ: {kinds}", stacklevel=2)
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
        raise ValueError(f"expected {models} {what}, one a model, but got {len(given)}")
    if not (given.isfinite().all() and (given >= 0).all() and given.sum() > 0):
        raise ValueError(f"{what} are not negative, and not all 0, but got {given.tolist()}")
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
            raise ValueError("one value a channel in all has no variance: counts must sum to 2 at least")
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
        raise ValueError(f"{name} is not of one shape in all models: {shapes}")


def _average(name: str, states: list[State], shares: Tensor) -> Tensor:
    _require_one_shape(name, states)
    first = states[0][name]
    total = torch.zeros_like(first, dtype=torch.promote_types(first.dtype, torch.float64))
    for state, share in zip(states, shares.flatten().tolist(), strict=True):
        if share:
            total += state[name].detach().to(total) * share
    return total.to(first.dtype)
