"""What of a class is rewritten, what that fuses and what it leaves: worked out once for all modules alike."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from types import FunctionType, MappingProxyType
from typing import Any, NamedTuple

from torch import nn

from . import source
from .ending import runs_quietly, wait_at_the_end
from .patterns import GIVEN, LAYER, RETURNS
from .reading import Method, Roles, methods_of, refusal
from .rewrite import Fused, Rewriter
from .sequential import FusedSequential
from .syntax import HELPERS

# Each method by its name: as it was written, and rewritten.
_Methods = dict[str, tuple[Callable[..., Any], Callable[..., Any]]]


class Plan(NamedTuple):
    """What of a class changes, and what that fuses."""

    methods: _Methods
    fused: tuple[Fused, ...] = ()
    left: tuple[str, ...] = ()
    attributes: Mapping[str, Any] = MappingProxyType({})  # what parents look for
    facts: frozenset[str] = frozenset()  # of its forward: GIVEN, RETURNS


def plan(original: type[nn.Module], roles: Roles) -> Plan:
    """Of a class, for modules whose attributes have these roles."""
    methods = methods_of(original)
    why = refusal(original, methods)
    if in_order(original):
        as_it_runs = {"forward": (nn.Sequential.forward, FusedSequential.forward)}
        return Plan({}) if why else Plan(as_it_runs, attributes={"runs_in_order": True})
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
        return Plan({}, left=(why,) * bool(fused or left), facts=facts)
    return Plan(rewritten, tuple(fused), tuple(left), attributes, facts)


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
        attributes["_batchnorm_pending"] = until_replaced(original, "forward", method.function, waiting)
    return attributes


def _local(function: FunctionType) -> set[str]:
    """The variables that nobody but the function itself sees."""
    return set(function.__code__.co_varnames) - set(function.__code__.co_cellvars)


def until_replaced(
    original: type, name: str, written: Callable[..., Any], new: Callable[..., Any]
) -> Callable[..., Any]:
    """The new method, until the class is given another in the place of the written one."""

    @functools.wraps(written)
    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # Whoever gives the class another method afterwards means these modules too.
        current = getattr(original, name)
        return (new if current is written else current)(self, *args, **kwargs)

    return method


def in_order(original: type[nn.Module]) -> bool:
    """Whether its forward is nn.Sequential's."""
    return issubclass(original, nn.Sequential) and original.forward in (nn.Sequential.forward, FusedSequential.forward)


def original_of(module: nn.Module) -> type[nn.Module]:
    """The class the module had before it was fused."""
    kind = type(module)
    return nn.Sequential if kind is FusedSequential else vars(kind).get("_fused_from", kind)
