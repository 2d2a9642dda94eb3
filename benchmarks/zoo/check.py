"""What one model gives: converted, fused, reverted, folded, diagnosed, summed up; every step beside torch's."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

import batchnorm as bn
from batchnorm.model.find import find

from .models import build
from .pairs import activated_by_ours, watch

# In float64 both sides round at 1e-16; the deepest nets amplify that by some 1e5, so 1e-8 leaves a factor of a
# thousand, and a wrong formula is off by 1e-3 and more.
WIDE = 1e-8
# In float32 both round, each in its own way: the errors against float64 are of one size, not the same.
NARROW, LEAST = 4.0, 1e-5


def check(library: str, name: str) -> dict[str, Any]:
    """One row of the table."""
    model, x = build(library, name)
    _determined(model)
    with torch.random.fork_rng():
        fresh = [finding for finding in bn.diagnose(model) if finding.severity == "serious"]
    _unlike_new(model)
    norms = {n: m for n, m in model.named_modules() if _is_norm(m)}
    row: dict[str, Any] = {"library": library, "model": name, "norms": len(norms), "serious": len(fresh)}
    row["diagnosed"] = len(norms) == len(find(model))

    wide, wide_x = copy.deepcopy(model).double(), x.double()
    exact = _step(copy.deepcopy(wide), wide_x)
    wrong = []
    for fuse in (False, True):
        said, converted = _quietly(lambda fuse=fuse: bn.convert(copy.deepcopy(wide), fuse=fuse))
        how = "convert(fuse=True)" if fuse else "convert"
        if (error := _error(_step(converted, wide_x), exact)) > WIDE:
            wrong.append(f"{how} is off by {error:.1g} in float64")
        narrow = _quietly(lambda fuse=fuse: bn.convert(copy.deepcopy(model), fuse=fuse))[1]
        ours_off, theirs_off = _narrow_errors(narrow, model, wide, x)
        if ours_off > NARROW * theirs_off + LEAST:
            wrong.append(f"{how} is off by {ours_off:.1g} in float32, torch by {theirs_off:.1g}")
        if converted.state_dict().keys() != wide.state_dict().keys():
            wrong.append(f"{how} changes the state_dict")
        if not fuse:
            ours = {n for n, m in converted.named_modules() if _is_ours(m)}
            kept = {found.name for found in find(model) if found.adapter.kept(found.layer) is not None}
            row |= {"converted": len(ours), "named": len(norms.keys() & kept), "reasons": _reasons(said)}
            row["silent"] = sorted(norms.keys() - ours - kept)
        reverted = bn.revert(narrow)
        # a copy of a torch.fx graph has a class of its own
        if [type(m).__qualname__ for m in reverted.modules()] != [type(m).__qualname__ for m in model.modules()]:
            wrong.append(f"revert after {how} leaves other classes")
    row |= _fused(model, x)
    row |= _folded(model, x, wrong)
    row["summary"] = len(bn.summary(model).rows) if hasattr(bn, "summary") else None
    row["wrong"] = wrong
    return row


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm) or "FrozenBatchNorm" in type(module).__name__


def _is_ours(module: nn.Module) -> bool:
    return any(cls.__module__.startswith("batchnorm.nn") for cls in type(module).__mro__)


def _quietly(make: Callable[[], Any]) -> tuple[list[str], Any]:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        made = make()
    return [str(each.message) for each in said if issubclass(each.category, UserWarning)], made


def _reasons(said: Iterable[str]) -> str:
    lines = [line.strip() for text in said if text.startswith("converted") for line in text.splitlines()[1:]]
    return "; ".join(lines)


def _determined(model: nn.Module) -> None:
    """Without chance: two models that draw random numbers in another order are not to be compared."""
    for module in model.modules():
        for name in ("p", "drop_prob", "drop_rate", "attn_dropout", "stochastic_depth_prob"):
            if isinstance(vars(module).get(name), float):
                setattr(module, name, 0.0)


def _unlike_new(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if _is_norm(module) and getattr(module, "running_var", None) is not None:
            for name, low, high in (("weight", 0.5, 1.5), ("bias", -0.3, 0.3), ("running_mean", -0.3, 0.3)):
                tensor = getattr(module, name)
                if tensor is not None:
                    tensor.data.uniform_(low, high, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)  # pyright: ignore[reportCallIssue]


def _outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    leaves = _pytree.tree_leaves(_plain(model(x)))
    return [t for t in leaves if isinstance(t, Tensor) and t.is_floating_point()]


def _plain(value: Any) -> Any:
    return dict(value) if hasattr(value, "items") else value


def _step(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Outputs, gradients and buffers of one training step: forward, backward of a fixed sum, in train mode."""
    model.train()
    torch.manual_seed(0)
    outputs = _outputs(model, x)
    generator = torch.Generator().manual_seed(2)
    weights = [torch.rand(y.shape, generator=generator, dtype=torch.float64).to(y.dtype) for y in outputs]
    loss = sum((y * w).sum() for y, w in zip(outputs, weights, strict=True))
    if isinstance(loss, Tensor) and loss.requires_grad:
        loss.backward()
    found = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    gradients = [p.grad.flatten().double() for p in model.parameters() if p.grad is not None]
    if gradients:
        found["gradients"] = torch.cat(gradients)
    buffers = [b.flatten().double() for n, b in model.named_buffers() if b.is_floating_point() and "running" in n]
    if buffers:
        found["running statistics"] = torch.cat(buffers)
    counters = [b for n, b in model.named_buffers() if n.endswith("num_batches_tracked")]
    if counters:
        found["counters"] = torch.stack(counters).double()
    return found


def _narrow_errors(ours: nn.Module, theirs: nn.Module, wide: nn.Module, x: Tensor) -> tuple[float, float]:
    """The least of three inputs' errors, ours and torch's: at a ReLU's kink rounding decides, for either of them."""
    errors = []
    for k in range(3):
        again = x if k == 0 else torch.randn(x.shape, generator=torch.Generator().manual_seed(k))
        exact = _step(copy.deepcopy(wide), again.double())
        errors.append([_error(_step(copy.deepcopy(m), again), exact) for m in (ours, theirs)])
        if errors[-1][0] <= NARROW * errors[-1][1] + LEAST:
            break
    return min(errors, key=lambda pair: pair[0])


def _error(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """The largest error of anything in a step, over its size, as root of mean squares: one kink of a ReLU is little."""
    if found.keys() != exact.keys():
        return math.inf
    errors = [(found[n].double() - exact[n].double()).norm() / (exact[n].double().norm() + 1e-30) for n in exact]
    return max((float(error) if error.isfinite() else math.inf for error in errors), default=0.0)


def _fused(model: nn.Module, x: Tensor) -> dict[str, Any]:
    """Pairs of batch norm and activation that ran, and what became of them."""
    original = copy.deepcopy(model).train()
    seen = watch(original, lambda: _outputs(original, x))
    _, converted = _quietly(lambda: bn.convert(copy.deepcopy(model), fuse=True))
    converted.train()
    numbers = activated_by_ours(converted, lambda: _outputs(converted, x))
    fused = {n for n, m in converted.named_modules() if id(m) in numbers}
    explained = [n for n, fusion in bn.nn.explain_fusion(converted).items() if fusion.left]
    kept = {found.name for found in find(converted) if not _is_ours(found.layer)}
    left = [norms for norms in seen.activated if not norms & fused]
    named = [norms for norms in left if norms & kept or any(_within(n, m) for n in norms for m in explained)]
    others = len(seen.activated_by_others)
    return {
        "pairs": len(seen.activated),
        "fused": len(seen.activated) - len(left),
        "explained": len(named),
        "others": others,
    }


def _within(name: str, module: str) -> bool:
    return not module or name == module or name.startswith(f"{module}.")


def _folded(model: nn.Module, x: Tensor, wrong: list[str]) -> dict[str, Any]:
    model = copy.deepcopy(model).double().eval()
    seen = watch(model, lambda: _outputs(model, x.double()))
    with torch.no_grad():
        expected = _outputs(model, x.double())
        try:
            folded = _quietly(lambda: bn.fold(model, x.double()))[1]
        except RuntimeError as error:
            wrong.append(f"fold: {str(error)[:100]}")
            return {"foldable": len(seen.foldable), "folded": 0}
        found = _outputs(folded, x.double())
    steps = ({str(i): y for i, y in enumerate(ys)} for ys in (found, expected))
    if (error := _error(*steps)) > WIDE:
        wrong.append(f"fold is off by {error:.1g}")
    return {"foldable": len(seen.foldable), "folded": len(seen.foldable & folded.folding.folded.keys())}
