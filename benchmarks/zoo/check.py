"""What one model gives: converted, fused, reverted, folded, diagnosed, summed up; every step beside torch's."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

import batchnorm as bn
from batchnorm.model.find import find

from .models import build
from .pairs import activated_by_ours, is_norm, watch
from .steps import WIDE, Torchs, call, errors, step, take_out_chance, too_far, train_a_little, widened


def check(library: str, name: str) -> dict[str, Any]:
    """One row of the table."""
    model, x = build(library, name)
    take_out_chance(model)
    row: dict[str, Any] = {"library": library, "model": name, "wrong": []}
    norms = {name for name, module in model.named_modules() if is_norm(module)}
    row |= {"norms": len(norms), "found": norms == {each.name for each in find(model)}}
    row["serious"] = _or_wrong(row, "diagnose", lambda: _serious(model))
    row["summary"] = _or_wrong(row, "summary", lambda: _summed_up(model))
    train_a_little(model)
    torchs = Torchs(model, x)
    for fuse in (False, True):
        how = "convert(fuse=True)" if fuse else "convert"
        _or_wrong(row, how, lambda how=how, fuse=fuse: _converted(row, how, fuse, torchs, norms))
    _or_wrong(row, "fuse", lambda: row.update(fusion(model, x)))
    _or_wrong(row, "fold", lambda: row.update(_folded(row, model, x)))
    return row


def _or_wrong(row: dict[str, Any], what: str, make: Callable[[], Any]) -> Any:
    """What `make` returns; of what raises, the row says so, and the others are checked all the same."""
    try:
        return make()
    except Exception as error:
        said = str(error).splitlines() or [""]
        row["wrong"].append(f"{what} raises {type(error).__name__}: {said[0][:100]}")


def _serious(model: nn.Module) -> int:
    with torch.random.fork_rng():
        return len(bn.diagnose(copy.deepcopy(model)).serious)


def _summed_up(model: nn.Module) -> int | None:
    """How many batch norms the summary lists."""
    summary = getattr(bn, "summary", None)
    return None if summary is None else len(summary(copy.deepcopy(model)).rows)


def _converted(row: dict[str, Any], how: str, fuse: bool, torchs: Torchs, norms: set[str]) -> None:
    model, wide = torchs.model, torchs.wide
    said, converted = _quietly(lambda: bn.convert(copy.deepcopy(wide), fuse=fuse))
    if not fuse:
        ours = {name for name, module in converted.named_modules() if _is_ours(module)}
        kept = {each.name for each in find(model) if each.adapter.kept(each.layer) is not None}
        reasons = _reasons(said)
        row |= {"converted": len(ours), "named": len((norms & kept) - ours), "reasons": "; ".join(reasons)}
        row["silent"] = sorted(norms - ours - kept)
        if (told := sum(int(line.split()[0]) for line in reasons)) != row["named"]:
            row["wrong"].append(f"the warning names {told} of {row['named']} that stay as they are")
    found = step(copy.deepcopy(converted), widened(torchs.x(0)))
    off = {name for name, error in errors(found, torchs.exact(0)).items() if error > WIDE}
    if any(errors(found, torchs.exact(0))[name] > 8 * torchs.amplified().get(name, 0.0) for name in off):
        _compare(row, f"{how} in float64", found, torchs.exact(0))
    if converted.state_dict().keys() != wide.state_dict().keys():
        row["wrong"].append(f"{how} changes the keys of the state_dict")
    narrow = _quietly(lambda: bn.convert(copy.deepcopy(model), fuse=fuse))[1]
    if far := too_far(narrow, torchs):
        row["wrong"].append(f"{how} in float32 is farther off than torch: {far}")
    _quietly(lambda: bn.revert(narrow))
    # a copy of a torch.fx graph has a class of its own, of the same name
    if [type(m).__qualname__ for m in narrow.modules()] != [type(m).__qualname__ for m in model.modules()]:
        row["wrong"].append(f"revert after {how} leaves other classes")
    _compare(row, f"revert after {how}", step(narrow, torchs.x(0)), torchs.narrow(0))


def _compare(row: dict[str, Any], what: str, found: dict[str, Any], exact: dict[str, Any]) -> None:
    off = {name: error for name, error in errors(found, exact).items() if error > WIDE}
    if off:
        row["wrong"].append(f"{what} is off: " + ", ".join(f"{name} by {error:.1g}" for name, error in off.items()))


def fusion(model: nn.Module, x: Any) -> dict[str, Any]:
    """Pairs of batch norm and activation that ran, and what became of them."""
    original = copy.deepcopy(model).train()
    seen = watch(original, lambda: call(original, x))
    converted = _quietly(lambda: bn.convert(copy.deepcopy(model), fuse=True))[1].train()
    numbers = activated_by_ours(converted, lambda: call(converted, x))
    fused = {name for name, module in converted.named_modules() if id(module) in numbers}
    explained = [name for name, fusion in bn.nn.explain_fusion(converted).items() if fusion.left]
    kept = {each.name for each in find(converted) if not _is_ours(each.layer)}
    left = [norms for norms in seen.activated if not norms & fused]
    lists = {name for name, module in converted.named_modules() if isinstance(module, nn.ModuleList | nn.ModuleDict)}
    named = [norms for norms in left if norms & kept or any(_within(n, m, lists) for n in norms for m in explained)]
    return {
        "pairs": len(seen.activated),
        "fused": len(seen.activated) - len(left),
        "explained": len(named),
        "others": len(seen.activated_by_others),
        "neither": sorted("+".join(sorted(norms)) for norms in left if norms not in named),
    }


def _folded(row: dict[str, Any], model: nn.Module, x: Any) -> dict[str, Any]:
    model, x = copy.deepcopy(model).double().eval(), widened(x)
    with torch.no_grad():
        seen = watch(model, lambda: call(model, x))
        folded = _quietly(lambda: bn.fold(model, x))[1]
        steps = [{str(i): y for i, y in enumerate(call(each, x))} for each in (folded, model)]
    _compare(row, "fold", *steps)
    gone = folded.folding.folded.keys()
    return {
        "foldable": len(seen.foldable),
        "folded": len(seen.foldable & gone),
        "unfolded": [f"{n}: {folded.folding.refused.get(n, 'not named')}" for n in sorted(seen.foldable - gone)],
    }


def _is_ours(module: nn.Module) -> bool:
    return any(cls.__module__.startswith("batchnorm.nn") for cls in type(module).__mro__)


def _within(name: str, module: str, lists: set[str]) -> bool:
    """Whether the module can be the one that calls the norm: an ancestor with no more than two between, lists aside."""
    levels = 0
    while name != module and name:
        levels += name not in lists
        name = name.rpartition(".")[0]
    return name == module and levels <= 3


def _quietly(make: Callable[[], Any]) -> tuple[list[str], Any]:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        made = make()
    return [str(each.message) for each in said if issubclass(each.category, UserWarning)], made


def _reasons(said: Iterable[str]) -> list[str]:
    """The lines of convert's warning: how many of which class stay, and why."""
    return [line.strip() for text in said if text.startswith("converted") for line in text.splitlines()[1:]]
