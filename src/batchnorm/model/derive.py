"""Conversion of subclasses of torch.nn's layers: a derived class, in which `super().forward` calls our layer."""

from __future__ import annotations

import copyreg
from collections.abc import Callable
from functools import cache
from typing import Any

from torch import Tensor, nn

from ..activations import of_module
from ..mixin import observed, plain_class, set_class
from ..nn.layer import BatchNormLayer as Layer
from ..nn.layer import skipped_by
from ..nn.options import beyond_torch

# A derived class has these attributes of our classes too, unless the layer already uses the name.
_SHOWN: dict[str, Callable[[Any], Any]] = {
    "measured": lambda layer: layer._batchnorm_moments,
    "skipped": skipped_by,
    "beyond_torch": beyond_torch,
}
# The adapters' forwards by name, because a derived class is pickled as its parts.
Forward = Callable[..., Tensor]


def derive(layer: nn.Module, forward: Forward | None) -> None:
    """Give the layer a class derived from its own and ours; `forward`, if given, replaces its own forward.

    Args:
        layer: of a subclass of torch.nn's batch norms.
        forward: f(layer, x, normalize, fuses), see `Adapter.forward`; None where the class's own calls super().forward.
    """
    cls = plain_class(layer)
    own = {*dir(cls), *vars(layer), *layer._parameters, *layer._buffers, *layer._modules}
    set_class(layer, _derived(cls, forward, tuple(name for name in _SHOWN if name not in own)))


def underived(layer: nn.Module) -> bool:
    """Undo `derive` if it made the layer's class; return whether it did."""
    original = plain_class(layer).__dict__.get("_derived_from")
    if original is not None:
        set_class(layer, original)
    return original is not None


class _Derived(type):
    """The classes of `_derived`: made at run time, so they are pickled as their parts."""


def _reduce(cls: Any) -> tuple[Any, ...]:
    return _derived, cls.__dict__["_derived_with"]


copyreg.pickle(_Derived, _reduce)


@cache
def _derived(cls: type[nn.Module], forward: Forward | None, shown: tuple[str, ...]) -> type[nn.Module]:
    """The derived class, under the name of the original, which torch.fx for one looks at."""
    members: dict[str, Any] = {name: property(_SHOWN[name]) for name in shown}
    members |= {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    members |= {"_derived_from": cls, "_derived_with": (cls, forward, shown)}
    if forward is not None:
        members |= {"forward": _adapted(forward), "_runs_parts": True}
    bases: Any = (cls, Layer)
    made: Any = _Derived(cls.__name__, bases, members)
    return made


def _adapted(forward: Forward) -> Forward:
    def adapted(self: Any, x: Tensor, residual: Tensor | None = None, *, activation: Any = None) -> Tensor:
        # A caller that passes more than x has checked that the forward runs nothing after ours.
        if residual is not None or activation is not None:
            return Layer.forward(self, x, residual, activation=activation)
        return forward(self, x, Layer.forward, _fused)

    return adapted


def _fused(activation: nn.Module) -> Any:
    """The activation to pass to our layer instead of running the module; None if the module has to run by itself."""
    return None if observed(activation) else of_module(activation)
