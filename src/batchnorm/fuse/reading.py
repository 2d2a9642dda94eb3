"""What can be known of a module's forward before it runs: its source, and what the attributes it uses are."""

from __future__ import annotations

import ast
import inspect
from abc import ABCMeta
from types import FunctionType
from typing import Any, NamedTuple

from torch import fx, nn

from .. import activations
from . import calls, source
from .patterns import (
    ABSENT,
    ACTIVATION,
    ENDS,
    ENDS_LOUDLY,
    FALSE,
    HARMLESS,
    IDENTITY,
    LAYER,
    MODULE,
    OTHER,
    PROPERTY,
    SOME_END,
)
from .syntax import path_of

# What the attributes that a class's methods use are in one of its modules, by their path after `self.`.
Roles = tuple[tuple[str, str], ...]
_SEES_THE_CHANGE = ("type", "__class__", "locals", "vars", "dir", "eval", "exec")


class Method(NamedTuple):
    """A method whose source can be rewritten; one with something wrapped around it can only be read."""

    owner: type
    function: Any
    definition: ast.FunctionDef
    self_name: str
    wrapped: bool = False


def is_read(original: type[nn.Module]) -> bool:
    """Whether its forward is written for a model: torch's own and ours have nothing to be found in."""
    ours = original.__module__.split(".")[0] in ("torch", __name__.split(".")[0])
    return not ours and original.forward is not nn.Module.forward


def methods_of(original: type[nn.Module]) -> dict[str, Method | source.Unreadable]:
    """forward and the methods it calls on itself, torch's own aside."""
    methods: dict[str, Method | source.Unreadable] = {}
    names = ["forward"]
    while names:
        name = names.pop()
        owner = next((kind for kind in original.__mro__ if name in vars(kind)), None)
        if name in methods or owner is None or owner.__module__.split(".")[0] == "torch":
            continue
        function = vars(owner)[name]
        if name != "forward" and not isinstance(function, FunctionType):
            continue
        written = inspect.unwrap(function)
        try:
            definition = source.read(written)
        except source.Unreadable as reason:
            methods[name] = reason
            continue
        self_name = _self_name(definition)
        methods[name] = Method(owner, written, definition, self_name, written is not function)
        own = (path_of(n, self_name) for n in ast.walk(definition) if isinstance(n, ast.Attribute))
        names += sorted({path for path in own if path})
    return methods


def roles_in(module: nn.Module, original: type[nn.Module]) -> Roles:
    """What every attribute that the methods use is in this module."""
    paths = {"": LAYER} if any(calls.fusible(m) for m in module.children()) else {}
    for method in methods_of(original).values():
        if isinstance(method, Method):
            nodes = (n for n in ast.walk(method.definition) if isinstance(n, ast.Attribute | ast.Subscript))
            used = {path for n in nodes if (path := path_of(n, method.self_name))}
            lists = used
            while lists := {f"{path}[]" for path in lists if any(_is_list(m) for m in _found(module, path))}:
                used |= lists
            paths |= {path: _role(module, path) for path in used}
    return tuple(sorted(paths.items()))


def refusal(original: type[nn.Module], methods: dict[str, Method | source.Unreadable]) -> str:
    """Why modules of this class cannot get another class; empty if they can."""
    if issubclass(original, fx.GraphModule):
        return "torch.fx generated its class: convert the model before tracing it"
    if type(original) not in (type, ABCMeta):
        return f"its metaclass {type(original).__name__} may react to a subclass"
    if any("__init_subclass__" in vars(kind) for kind in original.__mro__[:-1]):
        return "its class reacts to every subclass (__init_subclass__)"
    for method in methods.values():
        for node in ast.walk(method.definition) if isinstance(method, Method) else ():
            name = node.id if isinstance(node, ast.Name) else ""
            if name in _SEES_THE_CHANGE or (isinstance(node, ast.Attribute) and node.attr == "__class__"):
                return (
                    f"line {getattr(node, 'lineno', '?')}: {name or '__class__'} would see that the class has changed"
                )
    return ""


def _self_name(definition: ast.FunctionDef) -> str:
    """What a method calls its module; empty if that name may be another thing too."""
    first = [*definition.args.posonlyargs, *definition.args.args][:1]
    name = first[0].arg if first else ""
    arguments = [n for n in ast.walk(definition) if isinstance(n, ast.arg) and n.arg == name]
    names = [n for n in ast.walk(definition) if isinstance(n, ast.Name) and n.id == name]
    return name if len(arguments) == 1 and all(isinstance(n.ctx, ast.Load) for n in names) else ""


def _is_list(module: Any) -> bool:
    """Whether a loop over it gives its modules and runs nothing."""
    iterates = getattr(type(module), "__iter__", None)
    return iterates in (nn.ModuleList.__iter__, nn.Sequential.__iter__)


def _found(module: nn.Module, path: str) -> list[Any]:
    """What the path may be: for `a[]` every module in the list, or dict, a."""
    if not path.endswith("[]"):
        return [calls.child(module, path)]
    lists = _found(module, path.removesuffix("[]"))
    return [m for each in lists if _is_list(each) or isinstance(each, nn.ModuleDict) for m in each.children()]


def _role_of_any(items: list[Any]) -> str:
    """What one of a list is."""
    if any(calls.fusible(m) for m in items):
        return LAYER
    if items and all(activations.of_module(m) is not None for m in items):
        return IDENTITY if all(type(m) is nn.Identity for m in items) else ACTIVATION
    ends = [calls.last_of(m) is not None for m in items]
    return ENDS_LOUDLY if ends and ends[-1] else SOME_END if any(ends) else OTHER


def _role(module: nn.Module, path: str) -> str:
    if path.endswith("[]"):
        return _role_of_any(_found(module, path))
    found = calls.child(module, path)
    kind, name = type(module), path.split(".")[0]
    if hasattr(getattr(kind, name, None), "__get__") or kind.__getattribute__ is not object.__getattribute__:
        return PROPERTY  # or a method: what it is has to be run
    if hasattr(kind, name):
        return OTHER
    if found is None:
        return ABSENT if "." not in path and kind.__getattr__ is nn.Module.__getattr__ else OTHER
    if calls.fusible(found):
        return LAYER
    if type(found) is nn.Identity:
        return IDENTITY
    if activations.of_module(found) is not None or (isinstance(found, FunctionType) and found in calls.FUNCTIONS):
        return ACTIVATION
    if calls.last_of(found) is not None:
        return ENDS if calls.harmless(found) else ENDS_LOUDLY
    if calls.harmless(found):
        return HARMLESS
    if found is False and name != "training":
        return FALSE
    return MODULE if isinstance(found, nn.Module) else OTHER
