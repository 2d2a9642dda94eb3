"""What is fused in a model, and why the rest is not: for explain_fusion, the warning of convert, and summary."""

from __future__ import annotations

import inspect
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from torch import fx, nn

from .. import activations
from ..nn.naming import lines_of
from . import calls
from .patterns import GIVEN, RETURNS
from .plan import Plan, in_order, original_of, plan
from .reading import Roles, is_read, refusal, roles_in
from .reasons import ELSEWHERE
from .rewrite import Fused


class Fusion(NamedTuple):
    """What is fused in one module, such as "bn2 + add + relu", and what is left as it was, with the line and why."""

    fused: tuple[str, ...] = ()
    left: tuple[str, ...] = ()


def explain_fusion(model: nn.Module) -> dict[str, Fusion]:
    """Return what `convert(model, fuse=True)` fuses in each module, and why it does not fuse the rest.

    A fused part still runs step by step where that could make a difference: a hook on one of its modules, a residual of
    another shape or dtype, a layer replaced by one of another class. Every call checks this anew; this function does
    not.

    Args:
        model: a converted model.

    Returns:
        For each module whose own forward calls a batch norm and its activation, by its name in `named_modules`: a
        `Fusion(fused, left)`, two tuples of text.

    Example:
        >>> model = bn.convert(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU()), fuse=True)
        >>> bn.nn.explain_fusion(model)
        {'': Fusion(fused=('1 + 2',), left=())}
    """
    return {name: Fusion(tuple(map(str, fused)), left) for name, (fused, left) in _fusions(model).items()}


def fused_in(model: nn.Module) -> dict[str, tuple[Fused, ...]]:
    """What `explain_fusion` calls fused, in parts."""
    return {name: fused for name, (fused, _) in _fusions(model).items() if fused}


def left_over(model: nn.Module) -> str:
    """What is not fused, a line for each class and place: how many modules, which, in which file and line, and why."""
    modules = dict(model.named_modules())
    groups: dict[tuple[type, str], list[str]] = defaultdict(list)
    for name, fusion in explain_fusion(model).items():
        for why in fusion.left:
            groups[original_of(modules[name]), why].append(name or "the model")
    said = ((kind.__name__, names, _file_of(kind) + why) for (kind, why), names in groups.items())
    return "\n".join(lines_of(said))


def _file_of(kind: type) -> str:
    try:
        return f"{Path(inspect.getfile(kind)).name}, "
    except (TypeError, OSError):
        return ""


def _fusions(model: nn.Module) -> dict[str, tuple[tuple[Fused, ...], tuple[str, ...]]]:
    """What is fused and what is left in each module of which there is something to say."""
    fusions = {}
    plans: dict[tuple[type, Roles], Plan] = {}  # most modules are like another one
    facts: dict[int, frozenset[str]] = {}  # of each module, GIVEN or RETURNS
    # Children first: what they do with their input and output is a matter of their parent's.
    for name, module in reversed(list(model.named_modules())):
        original = original_of(module)
        fused, left = (), ()
        if in_order(original):
            fused, left = _fusion_in_order(module, original, facts)
        elif is_read(original):
            roles = roles_in(module, original)
            known = ((path + fact, fact) for path, _ in roles for fact in facts.get(id(calls.child(module, path)), ()))
            alike = original, (*roles, *known)
            if alike not in plans:
                plans[alike] = plan(*alike)
            fused, left, facts[id(module)] = plans[alike].fused, plans[alike].left, plans[alike].facts
            left += _not_by_name(module)
        elif isinstance(module, fx.GraphModule) and any(calls.fusible(m) for m in module.modules()):
            left = ("torch.fx generated its forward: call convert(model, fuse=True) before tracing the model",)
        if not any(calls.fusible(m) for m in module.modules()):
            facts.pop(id(module), None)  # an activation of another kind, maybe
        if fused or left:
            fusions[name] = fused, left
    return dict(reversed(fusions.items()))


def _fusion_in_order(
    module: nn.Module, original: type[nn.Module], facts: dict[int, frozenset[str]]
) -> tuple[tuple[Fused, ...], tuple[str, ...]]:
    """What is fused and left in a Sequential, of which the facts are found, too."""
    fused = tuple(Fused(first, False, second) for first, second in _pairs(module))
    why = refusal(original, {}) if fused else ""
    children = [(name, m) for name, m in module._modules.items() if m is not None and type(m) is not nn.Identity]
    if not children:
        return (), ()

    def known(child: nn.Module, fact: str) -> bool:
        return fact in facts.get(id(child), ())

    waits = {name: calls.last_of(m) is not None for name, m in children}
    given = {name: known(m, GIVEN) for name, m in children}
    elsewhere = tuple(
        f"{first} and {second}: {ELSEWHERE}"
        for (first, a), (second, b) in pairwise(children)
        if (known(a, RETURNS) and not waits[first] and (given[second] or activations.of_module(b) is not None))
        or (waits[first] and given[second])
    )
    (first, begins), (last, ends) = children[0], children[-1]
    facts[id(module)] = frozenset(
        [GIVEN] * (given[first] or activations.of_module(begins) is not None)
        + [RETURNS] * (waits[last] or known(ends, RETURNS))
    )
    return ((), (why, *elsewhere)) if why else (fused, elsewhere)


def _not_by_name(module: nn.Module) -> tuple[str, ...]:
    """Pairs of children that a container with a forward of its own may run one after the other."""
    pairs = _pairs(module) if isinstance(module, nn.Sequential | nn.ModuleDict | nn.ModuleList) else []
    return tuple(f"its forward does not call {first} and {second} by name" for first, second in pairs)


def _pairs(module: nn.Module) -> list[tuple[str, str]]:
    """Names of children that follow each other: a batch norm of ours without activation, and an activation."""
    return [
        (first, second)
        for (first, a), (second, b) in pairwise(module._modules.items())
        if calls.fusible(a) and calls.is_bare(a) and activations.of_module(b) is not None
    ]
