"""The class with the rewritten methods, which a module gets in place of its own, and gives back."""

from __future__ import annotations

from collections.abc import Callable
from types import new_class
from typing import Any

from torch import nn

from .plan import original_of, plan, until_replaced
from .reading import Roles, is_read, roles_in
from .sequential import FusedSequential


def fuse(model: nn.Module) -> None:
    """Give every module of the model whose forward can be fused a class that does it, in place."""
    # Children first: whether one ends in a batch norm decides what its parent can do.
    for module in reversed(list(model.modules())):
        original = original_of(module)
        if original is nn.Sequential:
            module.__class__ = FusedSequential
        elif is_read(original):
            module.__class__ = _fused_class(original, roles_in(module, original))


def unfuse(model: nn.Module) -> None:
    """Give every module that `fuse` changed its class back."""
    for module in model.modules():
        original = original_of(module)
        if original is not type(module):
            module.__class__ = original


def _fused_class(original: type[nn.Module], roles: Roles) -> type[nn.Module]:
    """A subclass with the methods rewritten, one for all modules alike; the class itself if nothing is fused."""
    for kind in original.__subclasses__():
        written = vars(kind).get("_written", {})
        if vars(kind).get("_roles") == roles and all(getattr(original, n) is m for n, m in written.items()):
            return kind
    methods, _, _, attributes, _ = plan(original, roles)
    if not (methods or attributes):
        return original
    members: dict[str, Any] = {
        **{name: vars(original)[name] for name in ("__module__", "__doc__") if name in vars(original)},
        "__qualname__": original.__qualname__,
        "__reduce_ex__": _reducer(original, roles),
        "_fused_from": original,
        "_roles": roles,
        "_written": {"forward": original.forward, **{name: written for name, (written, _) in methods.items()}},
        **{name: until_replaced(original, name, *pair) for name, pair in methods.items()},
        **attributes,
    }
    return new_class(original.__name__, (original,), exec_body=lambda namespace: namespace.update(members))


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
