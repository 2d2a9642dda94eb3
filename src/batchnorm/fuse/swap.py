"""The class with the rewritten methods, which a module gets in place of its own; what is fused, why not the rest."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from itertools import pairwise
from types import FunctionType, new_class
from typing import Any, NamedTuple

from torch import nn

from .. import activations
from . import calls, source
from .patterns import HELPERS, LAYER
from .reading import Method, Roles, is_read, methods_of, refusal, roles_in
from .rewrite import Rewriter
from .sequential import FusedSequential


class Fusion(NamedTuple):
    """What is fused in one module, such as "bn2 + add + relu", and what is left as it was, with the line and why."""

    fused: tuple[str, ...] = ()
    left: tuple[str, ...] = ()


# Each method by its name: as it was written, and rewritten.
_Methods = dict[str, tuple[Callable[..., Any], Callable[..., Any]]]


def fuse(model: nn.Module) -> None:
    """Give every module of the model whose forward can be fused a class that does it, in place."""
    for module in model.modules():
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
    fusions = {}
    for name, module in model.named_modules():
        original = _original(module)
        fusion = Fusion()
        if _in_order(original):
            fusion = _fusion_in_order(module, original)
        elif is_read(original):
            fusion = _plan(original, roles_in(module, original))[1]
        if any(fusion):
            fusions[name] = fusion
    return fusions


def _original(module: nn.Module) -> type[nn.Module]:
    """The class the module had before it was fused."""
    kind = type(module)
    return nn.Sequential if kind is FusedSequential else vars(kind).get("_fused_from", kind)


def _in_order(original: type[nn.Module]) -> bool:
    return issubclass(original, nn.Sequential) and original.forward in (nn.Sequential.forward, FusedSequential.forward)


def _fusion_in_order(module: nn.Module, original: type[nn.Module]) -> Fusion:
    fused = tuple(
        f"{first} + {second}"
        for (first, a), (second, b) in pairwise(module._modules.items())
        if isinstance(a, calls.LAYERS)
        and calls.fusible(a)
        and a.activation == activations.NONE
        and type(b) in activations.MODULES
    )
    why = refusal(original, {}) if fused else ""
    return Fusion((), (why,)) if why else Fusion(fused)


def _plan(original: type[nn.Module], roles: Roles) -> tuple[_Methods, Fusion]:
    """The methods of the class that change, and what that fuses."""
    methods = methods_of(original)
    why = refusal(original, methods)
    if _in_order(original):
        return ({} if why else {"forward": (nn.Sequential.forward, FusedSequential.forward)}), Fusion()
    rewritten: _Methods = {}
    fused: list[str] = []
    left: list[str] = []
    for name, method in methods.items():
        if not isinstance(method, Method):
            left += [f"{name} {method}"] * (("", LAYER) in roles)
            continue
        rewriter = Rewriter(copy.deepcopy(method.definition), method.self_name, dict(roles), _local(method.function))
        fused += rewriter.fused
        left += rewriter.left
        if rewriter.fused:
            rewritten[name] = (
                method.function,
                source.build(rewriter.definition, method.function, method.owner, HELPERS),
            )
    if why and fused:
        return {}, Fusion((), (why,))
    return rewritten, Fusion(tuple(fused), tuple(left))


def _local(function: FunctionType) -> set[str]:
    """The variables that nobody but the function itself sees."""
    return set(function.__code__.co_varnames) - set(function.__code__.co_cellvars)


def _fused_class(original: type[nn.Module], roles: Roles) -> type[nn.Module]:
    """A subclass with the methods rewritten, one for all modules alike; the class itself if nothing is fused."""
    for kind in original.__subclasses__():
        if vars(kind).get("_roles") == roles and all(
            getattr(original, n) is m for n, m in vars(kind)["_written"].items()
        ):
            return kind
    methods = _plan(original, roles)[0]
    if not methods:
        return original
    members: dict[str, Any] = {
        **{name: vars(original)[name] for name in ("__module__", "__doc__") if name in vars(original)},
        "__qualname__": original.__qualname__,
        "__reduce_ex__": _reducer(original, roles),
        "_fused_from": original,
        "_roles": roles,
        "_written": {name: written for name, (written, _) in methods.items()},
        **{name: _method(original, name, *pair) for name, pair in methods.items()},
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
