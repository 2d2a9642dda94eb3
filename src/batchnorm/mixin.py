"""Mixins: behavior that is added in front of the class of an existing layer, and removed again."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module

# Every batch-norm layer's base: torch.nn's, ours, SyncBatchNorm, subclasses.
BatchNorm = nn.modules.batchnorm._BatchNorm


class Mixin(nn.Module):
    """Base class of what is mixed into a layer's class.

    Only the layer's class changes. Whatever refers to the layer (optimizers, hooks, shared places, DDP) still does, and
    it is still an instance of its own class. torch.compile notices a change of class, but not a new hook.
    """

    _of: type[nn.Module]  # of the classes that `_mixed` makes: what they were made of
    _mixin: type[Mixin]
    _copied = True  # whether copies and pickles of a layer have it too

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time, so a pickle names what it is made of.
        _, _, *state = super().__reduce_ex__(max(2, protocol))
        return (_new, (plain_class(self), tuple(m for m in _mixins(type(self)) if m._copied)), *state)


def plain_class(layer: nn.Module) -> type[nn.Module]:
    """The layer's class without mixins: compare this one where the exact class matters."""
    return _unmixed(type(layer))


def _unmixed(cls: type[nn.Module]) -> type[nn.Module]:
    while "_mixin" in cls.__dict__:
        cls = cls.__dict__["_of"]
    return cls


def class_of_copies(layer: nn.Module) -> type[nn.Module]:
    """The layer's class without the mixins that copies do not get."""
    return _in_front(type(layer), _without(_behind(type(layer)), lambda mixin: not mixin._copied))


def set_class(layer: nn.Module, cls: type[nn.Module]) -> None:
    """Swap the layer's class for another; mixins stay."""
    _become(layer, _compose(cls, _mixins(_behind(type(layer)))))


def mix_in(layer: nn.Module, mixin: type[Mixin]) -> None:
    """Put the mixin in front of the layer's class, unless it is there."""
    if not isinstance(layer, mixin):
        _become(layer, _mixed(mixin, _behind(type(layer))))


def take_out(layer: nn.Module, mixin: type[Mixin]) -> None:
    """Undo `mix_in`."""
    _become(layer, _without(_behind(type(layer)), lambda each: each is mixin))


def _become(layer: nn.Module, behind: type[nn.Module]) -> None:
    layer.__class__ = _in_front(type(layer), behind)


def _without(cls: type[nn.Module], leave_out: Callable[[type[Mixin]], bool]) -> type[nn.Module]:
    return _compose(_unmixed(cls), tuple(mixin for mixin in _mixins(cls) if not leave_out(mixin)))


# torch.nn.utils.parametrize derives a class from the layer's current class, and expects it to stay the layer's class
# until the parametrization is removed. So mixins go behind it.


def _is_parametrized_class(cls: type[nn.Module]) -> bool:
    return len(cls.__bases__) == 1 and cls.__name__ == f"Parametrized{cls.__bases__[0].__name__}"


def _behind(cls: type[nn.Module]) -> type[nn.Module]:
    """The class behind a parametrization; for any other class, the class itself."""
    return cls.__bases__[0] if _is_parametrized_class(cls) else cls


def _in_front(cls: type[nn.Module], behind: type[nn.Module]) -> type[nn.Module]:
    """The class `behind`, with the parametrization of `cls` in front of it if there is one."""
    if not _is_parametrized_class(cls):
        return behind
    if cls.__bases__ == (behind,):
        return cls
    members = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    return type(cls.__name__, (behind,), members)  # a new one, because copies of the layer share its class


def _mixins(cls: type[nn.Module]) -> tuple[type[Mixin], ...]:
    return (cls.__dict__["_mixin"], *_mixins(cls.__dict__["_of"])) if "_mixin" in cls.__dict__ else ()


def _compose(cls: type[nn.Module], mixins: tuple[type[Mixin], ...]) -> type[nn.Module]:
    for mixin in reversed(mixins):
        cls = _mixed(mixin, cls)
    return cls


@cache
def _mixed(mixin: type[Mixin], cls: type[nn.Module]) -> type[nn.Module]:
    """The class under the same name: torch.fx, for one, goes by the name of the module."""
    namespace: dict[str, Any] = {"_of": cls, "_mixin": mixin}
    namespace |= {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    becomes = getattr(cls, "cls_to_become", None)  # what a lazy layer turns into at its first input
    if becomes is not None:
        namespace["cls_to_become"] = _mixed(mixin, becomes)
    return type(cls.__name__, (mixin, cls), namespace)


def _new(cls: type[nn.Module], mixins: tuple[type[Mixin], ...]) -> nn.Module:
    cls = _compose(cls, mixins)
    return cls.__new__(cls)


def is_parametrized(layer: nn.Module) -> bool:
    """Whether torch.nn.utils.parametrize computes a tensor of the layer; it has then changed the layer's class."""
    return "parametrizations" in layer._modules


def original_class(layer: nn.Module) -> type[nn.Module]:
    """The class that the layer was written with: without mixins, parametrizations, FSDP, and what `convert` derived."""
    cls = plain_class(layer)
    while True:
        bases = cls.__bases__
        if "_derived_from" in cls.__dict__:
            cls = cls.__dict__["_derived_from"]
        elif _is_parametrized_class(cls):
            cls = _unmixed(bases[0])
        elif any(base.__name__ == "FSDPModule" for base in bases[:-1]):
            cls = bases[-1]
        else:
            return cls


def is_sharded(layer: nn.Module) -> bool:
    """Whether fully_shard has changed the class of the layer itself."""
    return any(base.__name__ == "FSDPModule" for base in plain_class(layer).__bases__)


def runs_alone(layer: object) -> bool:
    """Whether it is a converted subclass whose forward is ours followed by its children, all of them identities."""
    if not isinstance(layer, nn.Module) or "_runs_parts" not in vars(cls := plain_class(layer)):
        return False
    parts = [part for part in layer._modules.values() if part is not None]
    return type(layer).forward is cls.forward and all(type(p) is nn.Identity and not observed(p) for p in parts)


def option(layer: nn.Module, name: str, default: Any) -> Any:
    """An option of a layer of ours, converted subclasses included; the default for every other layer."""
    options = getattr(type(layer), "_batchnorm_options", None)
    return default if options is None else getattr(layer._batchnorm_options, name)


def handed_over(layer: nn.Module) -> Any:
    """The Moments of the last batch that a layer of ours measured in training; None for a layer that keeps none."""
    return getattr(layer, "_batchnorm_moments", None)


def observed(module: nn.Module) -> bool:
    """Whether anybody would notice that the module's own output is never computed.

    A hook with the attribute `reads_statistics_alone` reads what the layer measures, never its output.
    """
    own = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    if any(not hasattr(hook, "reads_statistics_alone") for hooks in own if hooks for hook in hooks.values()):
        return True
    return "forward" in module.__dict__ or bool(torch_module._has_any_global_hook())
