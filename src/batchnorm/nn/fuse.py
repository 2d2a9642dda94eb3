"""Find batch norm -> activation and batch norm -> add -> activation in a model's forward passes, and run each as one.

Every module that calls batch-norm layers itself is traced on its own (torch.fx), its children taken whole, and gets a
forward in which the layers it calls do the addition and the activation too. So modules, parameters, names, hooks on
blocks and isinstance checks stay as they are, and one module that cannot be traced does not keep the others from it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from .. import activations
from .batchnorm import _BatchNorm

_FUNCTIONS: dict[Any, str] = {
    **{getattr(F, name): name for name in activations.NAMES if hasattr(F, name)},
    **{getattr(torch, name): name for name in activations.NAMES if hasattr(torch, name)},
}
_IN_PLACE = (operator.iadd, operator.isub, operator.imul, operator.itruediv)
_ADDITIONS = (operator.add, operator.iadd, torch.add)


class CannotFuse(Exception):
    """Why a module's forward cannot be replaced."""


def fuse(module: nn.Module) -> bool:
    """Give the module a forward with its batch norms fused with what follows them; False where nothing follows.

    Raises:
        CannotFuse: the forward pass cannot be traced, or a trace would not be all of it. The module is unchanged.
    """
    is_container = type(module).forward is nn.Module.forward  # ModuleList and its like: nothing calls it
    if is_container or isinstance(module, _Fused) or not any(isinstance(m, _BatchNorm) for m in module.children()):
        return False
    graph = _trace(module)
    if not sum(_fuse_node(module, graph, node) for node in list(graph.nodes)):
        return False
    graph.lint()
    forward = fx.GraphModule(module, graph).__class__.forward
    original = type(module)
    module.__class__ = type(original.__name__, (_Fused, original), {"forward": forward, "_original": original})
    return True


def unfuse(module: nn.Module) -> None:
    """Give a module that `fuse` changed the forward it had."""
    if isinstance(module, _Fused):
        module.__class__ = module._original  # pyright: ignore[reportAttributeAccessIssue]


class _Fused(nn.Module):
    """Marks the class of a module with a fused forward; `_original` is the class it had."""

    _original: type[nn.Module]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class exists in this process only; what can be pickled is the module before, to be fused again.
        return _rebuild, (self._original, self.__dict__)


def _rebuild(original: type[nn.Module], state: dict[str, Any]) -> nn.Module:
    module = original.__new__(original)
    module.__setstate__(dict(state))
    fuse(module)
    return module


def _trace(module: nn.Module) -> fx.Graph:
    """The module's own forward as a graph, or why a graph would not be the whole of it."""
    graphs = {}
    for training, looks_like in ((True, fx.Proxy), (False, fx.Proxy), (True, torch.Tensor)):
        before = dict(module.__dict__)
        module.training = training
        error = None
        try:
            graph = _Tracer(looks_like).trace(module)
            graphs[str(graph)] = graph
        except Exception as raised:  # tracing runs the user's code, which may raise anything on a proxy
            error = raised
        after = {**module.__dict__, "training": before["training"]}
        module.__dict__.clear()
        module.__dict__.update(before)
        changed = [name for name, value in after.items() if before.get(name, after) is not value]
        if changed:
            raise CannotFuse(f"its forward sets self.{changed[0]}, which a traced forward would not")
        if error is not None:
            raise CannotFuse(f"its forward cannot be traced: {(str(error) or repr(error)).splitlines()[0]}") from error
    if len(graphs) > 1:
        raise CannotFuse("its forward depends on the mode, on the type of its input, or on chance")
    return graphs.popitem()[1]


def _record(function: Callable[[Any, Any], Any]) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    return lambda proxy, other: proxy.tracer.create_proxy("call_function", function, (proxy, other), {})


class _Tracer(fx.Tracer):
    """Takes every child whole; its proxies answer isinstance as the class they should look like."""

    proxy_buffer_attributes = True  # else forward would change the buffers while it is traced

    def __init__(self, looks_like: type) -> None:
        super().__init__()

        # fx takes `a += b` for `a = a + b`, which is another thing where somebody else looks at a.
        in_place = {f"__{f.__name__}__": _record(f) for f in _IN_PLACE}
        self._proxy_class = type("Proxy", (fx.Proxy,), {"__class__": property(lambda _: looks_like), **in_place})

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return self._proxy_class(node, self)

    def create_arg(self, a: Any) -> Any:
        return a.node if type(a) is self._proxy_class else super().create_arg(a)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _fuse_node(module: nn.Module, graph: fx.Graph, node: fx.Node) -> bool:
    """Fuse what follows one call of a batch-norm layer into that call; False where nothing that fuses follows."""
    layer = _called(module, node)
    if not isinstance(layer, _BatchNorm) or layer.activation != activations.NONE or _observed(layer):
        return False
    if len(node.args) != 1 or node.kwargs:
        return False
    last, residual = node, None
    addition = _only_user(node)
    if addition is not None and (residual := _added_to(node, addition)) is not None:
        last = addition
    following = _only_user(last)
    activation = None if following is None else _activation_of(module, following)
    if following is None or activation is None or _changed_between(module, node, following, (node.args[0], residual)):
        return False
    with graph.inserting_before(following):
        # A module is handed over as it is, so that its parameters stay its own; a function by its name.
        given = graph.get_attr(activation) if following.op == "call_module" else activation
        options: dict[str, Any] = {"activation": given}
        if residual is not None:
            options["residual"] = residual
        fused = graph.call_module(str(node.target), node.args, options)
    following.replace_all_uses_with(fused)
    for dead in (following, last, node):
        if not dead.users and dead in graph.nodes:
            graph.erase_node(dead)
    return True


def _called(module: nn.Module, node: fx.Node) -> nn.Module | None:
    return module.get_submodule(str(node.target)) if node.op == "call_module" else None


def _observed(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _changed_between(module: nn.Module, first: fx.Node, last: fx.Node, values: tuple[Any, ...]) -> bool:
    """Whether a node between the two may change one of the values in place: then reading it later is not the same."""
    node = first.next
    while node is not last:
        name = getattr(node.target, "__name__", str(node.target))
        in_place = name.endswith("_") or node.target in _IN_PLACE
        in_place = in_place or getattr(_called(module, node), "inplace", False) or "inplace" in node.kwargs
        if in_place and any(argument in values for argument in node.all_input_nodes[:1]) and first not in node.args:
            return True
        node = node.next
    return False


def _added_to(node: fx.Node, addition: fx.Node) -> fx.Node | None:
    """The other summand, where `addition` adds something to the output of `node`."""
    by_function = addition.op == "call_function" and addition.target in _ADDITIONS
    by_method = addition.op == "call_method" and addition.target in ("add", "add_")
    if not (by_function or by_method) or len(addition.args) != 2 or addition.kwargs:
        return None
    first, second = addition.args
    in_place = addition.target in (operator.iadd, "add_")
    if first is node and isinstance(second, fx.Node) and second is not node:
        return second
    # `residual += bn(x)` changes the residual itself, which somebody may look at.
    return first if second is node and isinstance(first, fx.Node) and first is not node and not in_place else None


def _activation_of(module: nn.Module, node: fx.Node) -> str | None:
    """For a call of a fusible activation: the module's path, or the function's name."""
    called = _called(module, node)
    if called is not None:
        fusible = type(called) in activations.MODULES and not isinstance(called, nn.Identity) and not _observed(called)
        return str(node.target) if fusible else None
    # Functions and methods with their defaults only; `inplace` changes nothing that can be seen.
    if len(node.args) != 1 or set(node.kwargs) - {"inplace"}:
        return None
    if node.op == "call_function":
        return _FUNCTIONS.get(node.target)
    if node.op == "call_method" and str(node.target).rstrip("_") in ("relu", "sigmoid", "tanh"):
        return str(node.target).rstrip("_")
    return None


def fuse_all(model: nn.Module) -> list[str]:
    """Fuse every module of the model that can be; returns, of each that cannot, its name and why."""
    return [f"{name or 'the model itself'}: {reason}" for name, m in model.named_modules() if (reason := _refusal(m))]


def _refusal(module: nn.Module) -> str:
    try:
        fuse(module)
    except CannotFuse as reason:
        return str(reason)
    return ""
