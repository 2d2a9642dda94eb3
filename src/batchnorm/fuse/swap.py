"""The class with the rewritten methods, which a module gets in place of its own; what is fused, why not the rest."""

from __future__ import annotations

import copy
import functools
import inspect
from collections import defaultdict
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from types import FunctionType, MappingProxyType, new_class
from typing import Any, NamedTuple

from torch import fx, nn

from .. import activations
from ..nn.naming import lines_of
from . import calls, source
from .ending import runs_quietly, wait_at_the_end
from .patterns import GIVEN, HELPERS, LAYER, RETURNS
from .reading import Method, Roles, is_read, methods_of, refusal, roles_in
from .reasons import ELSEWHERE
from .rewrite import Fused, Rewriter
from .sequential import FusedSequential


class Fusion(NamedTuple):
    """What is fused in one module, such as "bn2 + add + relu", and what is left as it was, with the line and why."""

    fused: tuple[str, ...] = ()
    left: tuple[str, ...] = ()


# Each method by its name: as it was written, and rewritten.
_Methods = dict[str, tuple[Callable[..., Any], Callable[..., Any]]]


def fuse(model: nn.Module) -> None:
    """Give every module of the model whose forward can be fused a class that does it, in place."""
    # Children first: whether one ends in a batch norm decides what its parent can do.
    for module in reversed(list(model.modules())):
        original = _original(module)
        if original is nn.Sequential:
            module.__class__ = FusedSequential
        elif is_read(original):
            module.__class__ = _fused_class(original, roles_in(module, original))


def unfuse(model: nn.Module) -> None:
    """Give every module that `fuse` changed its class back."""
    for module in model.modules():
        original = _original(module)
        if original is not type(module):
            module.__class__ = original


def explain_fusion(model: nn.Module) -> dict[str, Fusion]:
    """What `convert(model, fuse=True)` fuses in each module, and what stands in the way of the rest.

    A fused part still runs part by part wherever that could make a difference: a hook on one of them, a residual of
    another shape or dtype, a layer replaced by one of another kind. That is asked at every call, not here.

    Args:
        model: a converted model.

    Returns:
        By the names of `named_modules`, for the modules whose own forward calls a batch norm and its activation: a
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


def _fusions(model: nn.Module) -> dict[str, tuple[tuple[Fused, ...], tuple[str, ...]]]:
    """What is fused and what is left in each module of which there is something to say."""
    fusions = {}
    plans: dict[tuple[type, Roles], _Plan] = {}  # most modules are like another one
    facts: dict[int, frozenset[str]] = {}  # of each module, GIVEN or RETURNS
    # Children first: what they do with their input and output is a matter of their parent's.
    for name, module in reversed(list(model.named_modules())):
        original = _original(module)
        fused, left = (), ()
        if _in_order(original):
            fused, left = _fusion_in_order(module, original, facts)
        elif is_read(original):
            roles = roles_in(module, original)
            known = ((path + fact, fact) for path, _ in roles for fact in facts.get(id(calls.child(module, path)), ()))
            alike = original, (*roles, *known)
            if alike not in plans:
                plans[alike] = _plan(*alike)
            fused, left, facts[id(module)] = plans[alike].fused, plans[alike].left, plans[alike].facts
            left += _not_by_name(module)
        elif isinstance(module, fx.GraphModule) and any(calls.fusible(m) for m in module.modules()):
            left = ("torch.fx wrote its forward: convert the model with fuse=True before it is traced",)
        if not any(calls.fusible(m) for m in module.modules()):
            facts.pop(id(module), None)  # an activation of another kind, maybe
        if fused or left:
            fusions[name] = fused, left
    return dict(reversed(fusions.items()))


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


def left_over(model: nn.Module) -> str:
    """What is not fused, a line for each class and place: how many modules, which, in which file and line, and why."""
    modules = dict(model.named_modules())
    groups: dict[tuple[type, str], list[str]] = defaultdict(list)
    for name, fusion in explain_fusion(model).items():
        for why in fusion.left:
            groups[_original(modules[name]), why].append(name or "the model")
    said = ((kind.__name__, names, _file_of(kind) + why) for (kind, why), names in groups.items())
    return "\n".join(lines_of(said))


def _file_of(kind: type) -> str:
    try:
        return f"{Path(inspect.getfile(kind)).name}, "
    except (TypeError, OSError):
        return ""


def _original(module: nn.Module) -> type[nn.Module]:
    """The class the module had before it was fused."""
    kind = type(module)
    return nn.Sequential if kind is FusedSequential else vars(kind).get("_fused_from", kind)


def _in_order(original: type[nn.Module]) -> bool:
    return issubclass(original, nn.Sequential) and original.forward in (nn.Sequential.forward, FusedSequential.forward)


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


class _Plan(NamedTuple):
    """What of a class changes, and what that fuses."""

    methods: _Methods
    fused: tuple[Fused, ...] = ()
    left: tuple[str, ...] = ()
    attributes: Mapping[str, Any] = MappingProxyType({})  # what parents look for
    facts: frozenset[str] = frozenset()  # of its forward: GIVEN, RETURNS


def _plan(original: type[nn.Module], roles: Roles) -> _Plan:
    methods = methods_of(original)
    why = refusal(original, methods)
    if _in_order(original):
        in_order = {"forward": (nn.Sequential.forward, FusedSequential.forward)}
        return _Plan({}) if why else _Plan(in_order, attributes={"runs_in_order": True})
    rewritten: _Methods = {}
    attributes: dict[str, Any] = {}
    fused: list[Fused] = []
    left: list[str] = []
    rewriters: dict[str, Rewriter] = {}
    for name, method in methods.items():
        if not isinstance(method, Method):
            left += [f"{name} {method}"] * (("", LAYER) in roles)
            continue
        local = _local(method.function)
        rewriter = Rewriter(copy.deepcopy(method.definition), method.self_name, dict(roles), local)
        rewriters[name] = rewriter
        if method.wrapped:
            left += [f"{name} {source.WRAPPED}"] * bool(rewriter.fused or rewriter.reasons.left())
            continue
        fused += rewriter.fused
        left += rewriter.reasons.left()
        if rewriter.fused:
            new = source.build(copy.deepcopy(rewriter.definition), method.function, method.owner, HELPERS)
            rewritten[name] = (method.function, new)
        if name == "forward":
            attributes = _ending(original, method, rewriter, local)
    facts = _facts(rewriters)
    if why:
        return _Plan({}, left=(why,) * bool(fused or left), facts=facts)
    return _Plan(rewritten, tuple(fused), tuple(left), attributes, facts)


def _facts(rewriters: dict[str, Rewriter]) -> frozenset[str]:
    """What a parent has to know of a module's forward."""
    forward = rewriters.get("forward")
    if forward is None:
        return frozenset()
    returns = forward.reasons.returns or forward.returns_by_a_method(rewriters)
    return frozenset([GIVEN] * forward.gives_its_input() + [RETURNS] * returns)


def _ending(original: type[nn.Module], method: Method, rewriter: Rewriter, local: set[str]) -> dict[str, Any]:
    """What a class has whose forward ends in a batch norm, or only hands values on."""
    attributes: dict[str, Any] = {}
    if runs_quietly(copy.deepcopy(method.definition), rewriter.is_):
        attributes["_batchnorm_runs_quietly"] = True
    definition = copy.deepcopy(rewriter.definition)
    path = wait_at_the_end(definition, rewriter.is_, local)
    if path is not None:
        waiting = source.build(definition, method.function, method.owner, HELPERS)
        attributes["_batchnorm_last"] = path
        attributes["_batchnorm_pending"] = _method(original, "forward", method.function, waiting)
    return attributes


def _local(function: FunctionType) -> set[str]:
    """The variables that nobody but the function itself sees."""
    return set(function.__code__.co_varnames) - set(function.__code__.co_cellvars)


def _fused_class(original: type[nn.Module], roles: Roles) -> type[nn.Module]:
    """A subclass with the methods rewritten, one for all modules alike; the class itself if nothing is fused."""
    for kind in original.__subclasses__():
        written = vars(kind).get("_written", {})
        if vars(kind).get("_roles") == roles and all(getattr(original, n) is m for n, m in written.items()):
            return kind
    methods, _, _, attributes, _ = _plan(original, roles)
    if not (methods or attributes):
        return original
    members: dict[str, Any] = {
        **{name: vars(original)[name] for name in ("__module__", "__doc__") if name in vars(original)},
        "__qualname__": original.__qualname__,
        "__reduce_ex__": _reducer(original, roles),
        "_fused_from": original,
        "_roles": roles,
        "_written": {"forward": original.forward, **{name: written for name, (written, _) in methods.items()}},
        **{name: _method(original, name, *pair) for name, pair in methods.items()},
        **attributes,
    }
    return new_class(original.__name__, (original,), exec_body=lambda namespace: namespace.update(members))


def _method(original: type, name: str, written: Callable[..., Any], new: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(written)
    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # Whoever gives the class another method afterwards means these modules too.
        current = getattr(original, name)
        return (new if current is written else current)(self, *args, **kwargs)

    return method


def _reducer(original: type[nn.Module], roles: Roles) -> Callable[..., Any]:
    """Pickles and copies as the original class does, and fuses what comes of it."""

    def __reduce_ex__(self: nn.Module, protocol: Any) -> Any:
        reduced = original.__reduce_ex__(self, protocol)
        if isinstance(reduced, str):
            return reduced
        make, args, *state = reduced
        make, *args = (original if part is type(self) else part for part in (make, *args))
        return _rebuild, (original, roles, make, tuple(args)), *state

    return __reduce_ex__


def _rebuild(original: type[nn.Module], roles: Roles, make: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    module = make(*args)
    if type(module) is original:
        module.__class__ = _fused_class(original, roles)
    return module
