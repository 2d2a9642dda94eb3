"""Calls: which of a model's layers feeds which, as far as torch.fx can tell."""

from __future__ import annotations

import inspect
import operator
import warnings
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from ...model.adapters import adapter_of
from ...model.run import copied

LAYERS = (nn.modules.conv._ConvNd, nn.Linear)
# Methods that use only the shape of another tensor, which they are given.
_SHAPED_AS = ("reshape_as", "view_as", "expand_as")
_SHAPE = ("size", "dim", "ndimension", "numel", "element_size")


class Calls:
    """Every call of a model's layers, as nodes of torch.fx graphs.

    The model is traced as a whole. A module whose forward cannot be traced counts as one call of unknown content, and
    each of its children is traced by itself, on the assumption that the forward runs each child whole. What it does
    with its own layers stays unknown; what happens within a child (an nn.Sequential, a block) is known.

    Attributes:
        of: the calls of each layer.
        module: the layer that each call is of.
        unknown: the layers that a forward which could not be traced may call, and which forward and why.
        read: parameters and buffers that some forward uses by itself, not by calling their layer.
    """

    def __init__(self, model: nn.Module) -> None:
        self.of: dict[nn.Module, list[fx.Node]] = defaultdict(list)
        self.module: dict[fx.Node, nn.Module] = {}
        self.unknown: dict[nn.Module, str] = {}
        self.read: set[Tensor] = set()
        self._graphs: list[fx.Graph] = []  # keeps their nodes alive
        # Tracing runs forwards, which may change their modules.
        twin = copied(model)
        self._real: dict[nn.Module, nn.Module] = dict(zip(twin.modules(), model.modules(), strict=True))
        tensors = zip((*twin.parameters(), *twin.buffers()), (*model.parameters(), *model.buffers()), strict=True)
        self._tensors: dict[Tensor, Tensor] = dict(tensors)
        waiting, seen = [(twin, "it is the whole model")], set()
        while waiting:
            root, reason = waiting.pop()
            if root in seen or not any(root.children()):
                self.unknown.setdefault(self._real[root], reason)
                continue
            seen.add(root)
            for opaque, why in self._trace(root, reason).items():
                waiting += [(child, why) for child in opaque.children()]
                self.unknown.update((self._real[child], why) for child in opaque.children())

    def _trace(self, root: nn.Module, reason: str) -> dict[nn.Module, str]:
        """Add the calls that root's forward makes; returns what in it could not be traced, and why."""
        tracer = _Tracer()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # no assertion is wanted that the defaults are what is given
                tracer.trace(root, _defaults(root.forward))
        except Exception as error:  # a forward may raise anything when it is given something that is no tensor
            tracer.opaque[root] = reason if type(root) in (nn.ModuleList, nn.ModuleDict) else _why(root, error)
        # Of a forward that raised, the calls up to there: more of them can only keep a layer from being folded.
        graph = tracer.graph
        self._graphs.append(graph)
        modules = dict(root.named_modules())
        for node in graph.nodes:
            if node.op == "call_module":
                self.module[node] = self._real[modules[node.target]]
                self.of[self.module[node]].append(node)
            elif node.op == "get_attr":
                tensor: Tensor = operator.attrgetter(node.target)(root)
                self.read.add(self._tensors.get(tensor, tensor))
        for node in [n for n in graph.nodes if type(self.module.get(n)) is nn.Identity and n.args]:
            self.remove(node)
        return tracer.opaque

    def layer(self, node: Any) -> nn.Module | None:
        """The layer that a node is a call of."""
        return self.module.get(node) if isinstance(node, fx.Node) else None

    def source(self, node: Any) -> Any:
        """Where a tensor comes from: of a linear layer's (N, L, C), before it was made (N * L, C)."""
        x = node.args[0] if isinstance(node, fx.Node) and node.args else None
        linear = self.layer(x)
        # Of other layers the channels are not last, so what is made of them has other channels.
        return x if isinstance(linear, nn.Linear) and _keeps_the_last(node, x, linear.out_features) else node

    def readers(self, node: fx.Node) -> list[fx.Node]:
        """What uses the values of a node: not what looks at its shape alone; of a flatten, what uses that."""
        found: list[fx.Node] = []
        for user in node.users:
            if not _looks_at_the_shape(user, node):
                found += user.users if self.source(user) is node else [user]
        return found

    def name(self, node: Any) -> str:
        """What the node is, for a message."""
        if isinstance(node, fx.Node) and node.op in ("call_function", "call_method", "call_module"):
            kind = "" if node.op == "call_module" else f"{node.op.removeprefix('call_')} "
            return f"{kind}{getattr(node.target, '__name__', node.target)}"
        return "the output" if isinstance(node, fx.Node) and node.op == "output" else "the input"

    def remove(self, node: fx.Node) -> None:
        """Let what a call was given take the place of what it returned."""
        node.replace_all_uses_with(node.args[0])  # pyright: ignore[reportArgumentType]
        node.graph.erase_node(node)
        del self.module[node]


def _looks_at_the_shape(user: fx.Node, of: fx.Node) -> bool:
    if user.op == "call_method":
        return user.target in _SHAPE or (user.target in _SHAPED_AS and user.args[0] is not of)
    return user.op == "call_function" and user.target is getattr and user.args[1] in ("shape", "ndim", "dtype")


def _keeps_the_last(node: fx.Node, x: Any, channels: int) -> bool:
    """Whether the node is x.flatten(0, 1), or x in two dimensions, of which the last is x's."""
    if node.target in ("flatten", torch.flatten):
        names = ("start_dim", "end_dim")
        return {**dict(zip(names, node.args[1:], strict=False)), **node.kwargs} == {"start_dim": 0, "end_dim": 1}
    if node.target not in ("reshape", "view", torch.reshape) or node.kwargs:
        return False
    sizes: Any = node.args[1] if isinstance(node.args[1], (tuple, list)) else node.args[1:]
    return len(sizes) == 2 and sizes[0] == -1 and (sizes[1] == channels or _is_last_size(sizes[1], x))


def _is_last_size(size: Any, of: Any) -> bool:
    """Whether the node is of.shape[-1] or of.size(-1)."""
    if not isinstance(size, fx.Node):
        return False
    if size.target is not operator.getitem:
        return size.target == "size" and size.args == (of, -1)
    shape, index = size.args
    if index != -1 or not isinstance(shape, fx.Node):
        return False
    return shape.args == (of, "shape") or (shape.target == "size" and shape.args == (of,))


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True  # to see who reads running statistics

    def __init__(self) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.opaque: dict[nn.Module, str] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        # Not torch's wrappers, such as DistributedDataParallel, where there is something in them to be seen.
        inside = any(adapter_of(module) for module in m.modules())
        return (
            isinstance(m, LAYERS)
            or adapter_of(m) is not None
            or (super().is_leaf_module(m, module_qualified_name) and not inside)
        )

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception as error:
            self.opaque[m] = _why(m, error)
            return self.create_proxy("call_module", self.path_of_module(m), args, kwargs)


def _why(module: nn.Module, error: Exception) -> str:
    said = str(error).strip().split("\n")[0]
    return f"the forward of {type(module).__name__} cannot be traced ({said or type(error).__name__})"


def _defaults(forward: Callable[..., Any]) -> dict[str, Any]:
    """The arguments that may be left out, left out: else each would be traced as given."""
    parameters = inspect.signature(forward).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}
