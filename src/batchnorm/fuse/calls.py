"""What a rewritten forward calls: a batch norm that waits for the addition and the activation after it.

Each function does exactly what the original source says, unless all its arguments are of known kinds (our own layers,
plain tensors, torch's activations) and nothing observes the values in between. So later replacements, hooks and patches
take effect.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from types import BuiltinFunctionType, FunctionType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import activations
from ..activations import Activation
from ..mixin import observed, option, plain_class, runs_alone
from ..nn.batchnorm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from ..nn.layer import BatchNormLayer

LAYERS = (BatchNorm1d, BatchNorm2d, BatchNorm3d)


class Pending(NamedTuple):
    """layer(x) + residual, not computed yet."""

    layer: Any
    x: Tensor
    residual: Tensor | None = None


def start(module: Any, x: Any, parent: nn.Module | None = None, between: tuple[str, ...] = ()) -> Any:
    """module(x), whose last batch norm may wait where running the parent's modules of these names first is the same."""
    layer = last_of(module) if type(x) is Tensor else None
    if (
        layer is not None
        and all(_harmless(child(parent, name), layer) for name in between)
        # Ranks have to meet in one order, whichever of them waits.
        and not (between and option(layer, "sync", False))
    ):
        if layer is module:
            return Pending(layer, x)
        return run_in_order(module, x) if runs_in_order(module) else module._batchnorm_pending(x)
    return module(x)


def last_of(module: Any) -> Any:
    """The layer of ours that runs last in the module, if it may wait for what comes after the module; else None."""
    if fusible(module):
        return module if is_bare(module) and not observed(module) else None
    if not isinstance(module, nn.Module) or observed(module) or module._compiled_call_impl is not None:
        return None
    if runs_in_order(module):
        modules = [m for m in module._modules.values() if type(m) is not nn.Identity]
        return last_of(modules[-1]) if modules else None
    path = vars(type(module)).get("_batchnorm_last")
    return None if path is None else last_of(child(module, path))


def runs_in_order(module: nn.Module) -> bool:
    """Whether it is a Sequential that `run_in_order` may run."""
    kind = type(module)
    written = vars(kind).get("_fused_from", nn.Sequential)
    return "runs_in_order" in vars(kind) and written.forward is nn.Sequential.forward


def run_in_order(modules: Any, x: Any) -> Any:
    """What the modules of a Sequential make of x; the last one may wait."""
    for module in modules:
        if type(x) is not Pending:
            x = start(module, x)
        elif type(module) is nn.Identity:
            x = through(module, x)
        else:
            x = finish(module, x)
    return x


def add(op: Callable[[Any, Any], Any], a: Any, b: Any) -> Any:
    """op(a, b) where op is an addition and one of the two may be pending."""
    pending, residual = (a, b) if type(a) is Pending else (b, a)
    if (
        type(pending) is Pending
        and pending.residual is None
        and type(residual) is Tensor
        # Of another shape or dtype the sum would be another tensor than x, and in place it would not be.
        and residual.shape == pending.x.shape
        and residual.dtype == pending.x.dtype
        and residual.device == pending.x.device
        and residual.layout == pending.x.layout
        and op in _ADDITIONS
    ):
        return Pending(pending.layer, pending.x, residual)
    return op(computed(a), computed(b))


def through(function: Any, value: Any) -> Any:
    """function(value), where only an Identity lets a pending value pass."""
    if type(value) is Pending and type(function) is nn.Identity and not observed(function):
        return value
    return function(computed(value))


def finish(function: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
    """function(value, *args, **kwargs), in one operation if the value is pending and the function is an activation."""
    if type(value) is Pending:
        activation = _activation(function, args, kwargs)
        if activation is not None:
            return value.layer(value.x, value.residual, activation=activation)
    return function(computed(value), *args, **kwargs)


def finish_method(name: str, value: Any) -> Any:
    """value.name(), in one operation if the value is pending; the name is one of `METHODS`."""
    if type(value) is Pending:
        return value.layer(value.x, value.residual, activation=name.rstrip("_"))
    return getattr(value, name)()


def fusible(layer: Any) -> bool:
    """Whether it is one of our layers and runs their forward alone, frozen or whatever else is mixed in."""
    ours = type(layer) in LAYERS or (isinstance(layer, LAYERS) and plain_class(layer) in LAYERS)
    return (ours and type(layer).forward is BatchNormLayer.forward) or runs_alone(layer)


def is_bare(layer: Any) -> bool:
    """Whether a fusible layer has no activation of its own."""
    return option(layer, "activation", activations.NONE) == activations.NONE


def child(parent: Any, path: str) -> Any:
    """What self.path is in the parent, found without running any code of its class; None for nothing."""
    for name in path.split("."):
        if parent is None:
            return None
        found = parent._modules.get(name) if isinstance(parent, nn.Module) else None
        parent = found if found is not None else getattr(parent, "__dict__", {}).get(name)
    return parent


def harmless(module: Any) -> bool:
    """Whether the module changes nothing but its own buffers, so that it may run before another or after it."""
    return _harmless(module, None)


def _harmless(module: Any, layer: Any) -> bool:
    if module is None:
        return True
    kind = type(module)
    if kind is nn.Sequential or runs_in_order(module) or _runs_quietly(kind):
        return not observed(module) and all(_harmless(m, layer) for m in module._modules.values())
    return (
        (kind in _QUIET or fusible(module) or activations.of_module(module) is not None)
        and module is not layer
        and not getattr(module, "inplace", False)
        and not observed(module)
        and not _shares_buffers(module, layer)
    )


def _runs_quietly(kind: type) -> bool:
    """Whether a class that `swap` made only hands values from one of its modules to the next, still as written."""
    quietly = "_batchnorm_runs_quietly" in vars(kind)
    return quietly and vars(kind)["_fused_from"].forward is vars(kind)["_written"]["forward"]


def _shares_buffers(module: nn.Module, layer: nn.Module | None) -> bool:
    if not module._buffers or layer is None:
        return False
    return any(a is b for a in module._buffers.values() for b in layer._buffers.values() if a is not None)


def computed(value: Any) -> Any:
    """The value, computed now if it is pending."""
    if type(value) is not Pending:
        return value
    y = value.layer(value.x)
    return y if value.residual is None else y + value.residual


def _activation(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What to hand to a layer as its activation for function(value, *args, **kwargs); None if it is something else."""
    if isinstance(function, nn.Module):
        return None if args or kwargs or observed(function) else activations.of_module(function)
    if type(function) in (FunctionType, BuiltinFunctionType) and function in FUNCTIONS:
        return FUNCTIONS[function](*args, **kwargs)
    return None


def _gelu(approximate: str = "none") -> Activation | None:
    return {"none": Activation("gelu"), "tanh": Activation("gelu_tanh")}.get(approximate)


def _named(name: str) -> Callable[..., Activation]:
    return lambda inplace=False: Activation(name)


# From torch's function to ours, with the signature it has after the input.
FUNCTIONS: dict[Any, Callable[..., Activation | None]] = {
    **{f: _named("relu") for f in (F.relu, F.relu_, torch.relu, torch.relu_)},
    **{f: _named("sigmoid") for f in (F.sigmoid, torch.sigmoid, torch.sigmoid_)},
    **{f: _named("tanh") for f in (F.tanh, torch.tanh, torch.tanh_)},
    **{getattr(F, name): _named(name) for name in ("relu6", "silu", "hardswish")},
    F.leaky_relu: lambda negative_slope=0.01, inplace=False: Activation("leaky_relu", float(negative_slope)),
    F.elu: lambda alpha=1.0, inplace=False: Activation("elu", float(alpha)),
    F.gelu: _gelu,
    F.hardtanh: lambda min_val=-1.0, max_val=1.0, inplace=False: (
        Activation("relu6") if (min_val, max_val) == (0.0, 6.0) else None
    ),
}
METHODS = ("relu", "relu_", "sigmoid", "sigmoid_", "tanh", "tanh_")


def add_by_method(a: Any, b: Any) -> Any:
    """a.add(b)"""
    return a.add(b)


def add_by_method_in_place(a: Any, b: Any) -> Any:
    """a.add_(b)"""
    return a.add_(b)


_ADDITIONS = (operator.add, operator.iadd, torch.add, add_by_method, add_by_method_in_place)
_QUIET = {
    *LAYERS,
    *activations.MODULES,
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, nn.Flatten, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
    *(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
}
