"""A case computed by the kernels, beside the definition in float64; nothing outside the tensors is read or written."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..activations import Activation
from ..ops.gpu import by_kernels
from .bands import Bands, banded
from .cases import Case, laid_out

EPS, MOMENTUM = 1e-5, 0.3
_SEEDS = 50
_KINKS = {"relu": (0,), "relu6": (0, 6), "leaky_relu": (0,), "elu": (0,), "hardswish": (-3, 3)}


class Operands(NamedTuple):
    """The tensors of a case."""

    x: Tensor
    dy: Tensor
    weight: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    mask: Tensor | None
    running_mean: Tensor
    running_var: Tensor


class Error(NamedTuple):
    """Of one result: the largest error, and the largest allowed, both absolute; `what` says of which."""

    what: str
    error: float
    allowed: float

    @property
    def is_wrong(self) -> bool:
        """Beyond what is allowed; NaN is."""
        return not self.error <= self.allowed


def errors(case: Case, device: str) -> list[Error]:
    """The errors of all results of a case; of a broken band, and of an operand that was written, too."""
    operands = make(case, device)
    kept = [None if tensor is None else banded(tensor) for tensor in operands]
    given = Operands(*(None if each is None else each[0] for each in kept))  # pyright: ignore[reportArgumentType]
    before = [None if each is None else each[1].clone() for each in kept]
    with Bands() as bands:
        results = run(case, given)
    found = [Error(f"bands written around {bands.broken()} results", float(bands.broken()), 0.0)]
    for name, each, was in zip(Operands._fields, kept, before, strict=True):
        moved = name.startswith("running_") and case.way == "whole"
        if each is not None and was is not None and not moved:
            found.append(Error(f"{name} written", float((each[1] != was).sum()), 0.0))
    return found + _errors(case, operands, results)


def make(case: Case, device: str) -> Operands:
    """The operands, of values whose activation has no kink within a rounding: there nobody could say what is right."""
    for seed in range(_SEEDS):
        random = torch.Generator().manual_seed(seed)
        operands = _make(case, random, device)
        if _away_from_kinks(case, operands):
            return operands
    raise AssertionError(f"no seed below {_SEEDS} keeps {case} away from kinks")


def run(case: Case, operands: Operands) -> dict[str, Tensor | None]:
    """What the kernels compute, by name."""
    x, dy, weight, bias, residual, mask, mean, var = operands
    of = {"weight": weight, "bias": bias, "eps": EPS, "act": case.activation.code, "slope": case.activation.slope}
    forward = {"x": x, **of, "residual": residual, "mask": mask}
    results: dict[str, Tensor | None] = {}
    if case.way == "whole":
        batches = torch.full((), 3, device=x.device)  # torch.tensor would copy from the CPU, which no graph can capture
        moved = {"running_mean": mean, "running_var": var, "batches": batches, "momentum": MOMENTUM}
        y, statistics = by_kernels("forward_", {**forward, **moved})
        results |= {"running_mean": mean, "running_var": var, "batches": batches}
    elif case.way == "steps":
        statistics = by_kernels("measure", {"x": x, "mask": mask})
        y = by_kernels("normalize", {**forward, "statistics": statistics})
    else:
        running = {"running_mean": mean, "running_var": var}
        y, statistics = by_kernels("infer", {**forward, **running, "keep": True})
    kept = {"residual": None, "y": y} if case.keeps_y else {"residual": residual, "y": None}
    given = {"dy": dy, "x": x, "statistics": statistics, **of, **kept, "mask": mask}
    wanted = {"need_dx": True, "need_dresidual": case.residual}
    if case.way == "steps":
        sums = by_kernels("reduce", given)
        dx, dresidual = by_kernels("apply", {**given, "sums": sums, **wanted})
        dbias, dweight = sums
    else:
        measured = case.way == "whole"
        dx, dresidual, dweight, dbias = by_kernels("backward", {**given, "measured": measured, **wanted})
    gradients = {"dx": dx, "dresidual": dresidual, "dweight": dweight, "dbias": dbias}
    return {"y": y, "statistics": statistics, **gradients, **results}


def _make(case: Case, random: torch.Generator, device: str) -> Operands:
    channels = case.shape[1]

    def normal(*shape: int, std: float = 1.0, mean: float = 0.0) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=random) * std + mean

    vectors = case.vectors or (torch.float64 if case.dtype == torch.float64 else torch.float32)
    x, dy, residual = (
        normal(*case.shape, std=std, mean=mean).to(device, case.dtype)
        for std, mean in ((2.0, case.mean), (1.0, 0.0), (1.0, 0.0))
    )
    mask = (torch.rand((case.shape[0], *case.shape[2:]), generator=random) < 2 / 3).to(device)
    if case.mask:
        x = x.masked_fill(~mask.unsqueeze(1), torch.nan)
    x = laid_out(x, case.layout)  # last, for gaps are lost where a tensor moves to another device or is masked
    if case.layout == "last":
        dy, residual = (laid_out(each, case.layout) for each in (dy, residual))
    operands = Operands(
        x,
        dy,
        normal(channels, std=0.5, mean=1.0).to(vectors) if case.affine else None,
        normal(channels, std=0.5).to(vectors) if case.affine else None,
        residual if case.residual else None,
        mask if case.mask else None,
        normal(channels, mean=case.mean).to(vectors),
        (normal(channels).abs() + 0.5).to(vectors),
    )
    return Operands(*(None if each is None else each.to(device) for each in operands))  # pyright: ignore[reportArgumentType]


def _definition(case: Case, operands: Operands, activation: Activation | None = None) -> tuple[tuple, dict]:
    x, _, weight, bias, residual, mask, mean, var = (None if each is None else each.cpu() for each in operands)
    running = (mean, var) if case.way == "eval" else None
    if mask is not None:
        assert x is not None
        x = x.masked_fill(~mask.unsqueeze(1), 0.0)
    options = {"running": running, "residual": residual, "mask": mask, "activation": activation or case.activation}
    return (x, weight, bias, EPS), options


def _away_from_kinks(case: Case, operands: Operands) -> bool:
    kinks = _KINKS.get(case.activation.name, ())
    given, options = _definition(case, operands, Activation("none"))
    z = reference.forward(*given, **options).y
    if operands.mask is not None:
        z = torch.where(operands.mask.cpu().unsqueeze(1), z, torch.nan)
    margin = 64 * torch.finfo(torch.float64 if case.dtype == torch.float64 else torch.float32).eps
    return not any(bool(((z - kink).abs() <= margin * (1 + z.abs())).any()) for kink in kinks)


def _errors(case: Case, operands: Operands, results: dict[str, Tensor | None]) -> list[Error]:
    given, options = _definition(case, operands)
    exact = reference.forward(*given, **options)
    gradients = reference.backward(operands.dy.cpu(), *given, **options)
    x = given[0]
    rounds = torch.finfo(torch.float64 if case.dtype == torch.float64 else torch.float32).eps
    ulp, vector_ulp = _ulp(case.dtype), 0.0 if case.vectors is None else _ulp(case.vectors)
    count = x.numel() // x.size(1) if operands.mask is None else max(int(operands.mask.sum()), 1)
    rstd = (exact.var + EPS).rsqrt()
    # x - mean carries the mean's rounding: float32 has it as a pair of floats, of 48 bits; float64 as one of 53.
    unit = 2.0**-53 if case.dtype == torch.float64 else 2.0**-48
    mean_error = float((exact.mean.abs() * rstd).max()) * unit
    # y: the mean to a rounding of its sum around the shift, five roundings of numbers up to the largest |z|.
    tall = max(1.0, float(exact.y.abs().max()))
    found = [_error("y", results["y"], exact.y, 8 * rounds * tall + 8 * mean_error, ulp)]
    spread, size = exact.var.sqrt(), 1 + exact.mean.abs()
    # Sums in the compute dtype of terms of the size of the spread, around a shift within some of it: a tile's rows are
    # added one after the other by the interpreter.
    fine = 8 * rounds
    statistics = results["statistics"]
    assert statistics is not None
    if case.way != "eval":
        counts = torch.full_like(exact.mean, count)
        var = statistics[2].cpu() / counts.clamp(min=1)
        found += [
            _error("count", statistics[0], counts, 0.0),
            _error("mean", statistics[1], exact.mean, float((fine * spread + 2**-52 * size).max())),
            _error("variance", var, exact.var, float((4 * fine * exact.var).max()) + 1e-14),
        ]
    else:
        found += [
            _error("count", statistics[0], torch.zeros_like(exact.mean), 0.0),
            _error("mean", statistics[1], exact.mean, 0.0),
            _error("variance", statistics[2], exact.var, 0.0),
        ]
    # Gradients are linear in dz: their errors are relative to the largest terms, of which dy as saved y may be coarse.
    coarse = torch.finfo(case.dtype).eps if case.keeps_y else rounds
    scale = float(operands.dy.abs().max()) * max(1.0, float(rstd.max()) * _largest(operands.weight)) * 2
    dz = float(operands.dy.abs().max()) * 2
    found += [
        _error("dx", results["dx"], gradients.dx, 16 * coarse * scale, ulp),
        _error("dresidual", results["dresidual"], gradients.dresidual, 16 * coarse * dz, ulp),
        _error("dbias", results["dbias"], gradients.dbias, 4 * coarse * count * dz, vector_ulp),
        _error("dweight", results["dweight"], gradients.dweight, 16 * coarse * count * dz, vector_ulp),
    ]
    if case.way == "whole":
        found += _tracked(case, operands, exact, count, results)
    return found


def _tracked(
    case: Case, operands: Operands, exact: reference.Forward, count: int, results: dict[str, Tensor | None]
) -> list[Error]:
    """The running statistics: the errors of what they follow, and one rounding."""
    mean, var = operands.running_mean.double().cpu(), operands.running_var.double().cpu()
    unbiased = exact.var * count / max(count - 1, 1)
    mean, var = mean + (exact.mean - mean) * MOMENTUM, var + (unbiased - var) * MOMENTUM
    computed = torch.float64 if case.dtype == torch.float64 else torch.float32
    rounds = max(torch.finfo(dtype).eps for dtype in (operands.running_mean.dtype, computed))
    return [
        _error("running_mean", results["running_mean"], mean, 4 * rounds * float(mean.abs().max() + 2)),
        _error("running_var", results["running_var"], var, 8 * rounds * float(var.abs().max())),
        _error("batches", results["batches"], torch.tensor(4), 0.0),
    ]


def _error(what: str, result: Tensor | None, exact: Tensor, allowed: float, ulp: float = 0.0) -> Error:
    """The largest error beyond one rounding of each value: the interpreter truncates, so one unit in the last place."""
    if result is None:
        return Error(what, 0.0, 0.0)
    off = (result.double().cpu() - exact.double()).abs() - ulp * exact.double().abs()
    return Error(what, float(off.max()) if bool(off.isfinite().all()) else float("nan"), allowed)


def _ulp(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps if dtype in (torch.bfloat16, torch.float16) else 0.0


def _largest(vector: Tensor | None) -> float:
    return 1.0 if vector is None else float(vector.abs().max())
