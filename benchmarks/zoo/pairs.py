"""What a model does with its batch norms when it runs, seen from outside: who fed them, and what came after."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

FUSIBLE = {"relu", "relu6", "hardtanh", "leaky_relu", "elu", "silu", "gelu", "hardswish", "sigmoid", "tanh"}
OTHERS = {"mish", "prelu", "selu", "celu", "hardsigmoid", "softplus", "hardshrink", "logsigmoid"}
_ADDS = {"add", "__add__", "__radd__", "__iadd__"}
_PRODUCERS = {"conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "linear"}


class Seen(NamedTuple):
    """Activations are told by the batch norms, by name, whose output they were given: two after an addition of two."""

    activated: set[frozenset[str]]  # by an activation that can be fused
    activated_by_others: set[frozenset[str]]
    foldable: set[str]  # a convolution or linear layer came right before


def is_norm(module: nn.Module) -> bool:
    """Whether it is a batch norm, by its class."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm) or "FrozenBatchNorm" in type(module).__name__


def watch(model: nn.Module, run: Callable[[], object]) -> Seen:
    """Run the model and see what happens to what its batch norms return."""
    mode = _Mode()
    handles = []
    for name, module in model.named_modules():
        if is_norm(module):
            handles.append(module.register_forward_pre_hook(lambda m, args, name=name: mode.enter(name, args)))
            handles.append(module.register_forward_hook(lambda m, args, y: mode.inside.pop() and None))
    try:
        with mode:
            run()
    finally:
        for handle in handles:
            handle.remove()
    return mode.seen


class _Mode(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen = Seen(set(), set(), set())
        self.inside: list[str] = []  # the batch norms that are running
        self.normalized: dict[int, frozenset[str]] = {}
        self.produced: set[int] = set()
        self.kept: list[Any] = []  # so that no other tensor has the number of one that is gone

    def enter(self, name: str, args: tuple[Any, ...]) -> None:
        """A batch norm begins."""
        self.inside.append(name)
        if args and id(args[0]) in self.produced:
            self.seen.foldable.add(name)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.kept.append((args, out))
        name = getattr(func, "__name__", "")
        name = name if name.startswith("__") else name.rstrip("_")
        tensors = [a for a in args if isinstance(a, Tensor)]
        first = id(tensors[0]) if tensors else 0
        marks = frozenset().union(*(self.normalized.get(id(t), ()) for t in tensors))
        if name == "batch_norm" and self.inside:
            self.normalized[id(out)] = frozenset([self.inside[-1]])
        elif name in _PRODUCERS or (name == "flatten" and first in self.produced and args[1:] == (0, 1)):
            self.produced.add(id(out))
        elif first in self.normalized and name in FUSIBLE | OTHERS:
            (self.seen.activated if _fits(name, args, kwargs) else self.seen.activated_by_others).add(marks)
            self.normalized.pop(id(out), None)  # it was computed in place
        elif name in _ADDS and marks and len(tensors) == 2 and tensors[0].shape == tensors[1].shape:
            self.normalized[id(out)] = marks
        return out


def _fits(name: str, args: Any, kwargs: Any) -> bool:
    bounds = tuple(args[1:3]) or (kwargs.get("min_val"), kwargs.get("max_val"))
    return name in FUSIBLE and (name != "hardtanh" or bounds == (0.0, 6.0))


def activated_by_ours(model: nn.Module, run: Callable[[], object]) -> set[int]:
    """The numbers (id) of our layers that ran with an activation in one operation."""
    from batchnorm.activations import NONE
    from batchnorm.nn.layer import BatchNormLayer

    fused: set[int] = set()
    own = BatchNormLayer.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        if kwargs.get("activation") not in (None, NONE):  # timm's BatchNormAct2d may have an Identity for one
            fused.add(id(self))
        return own(self, *args, **kwargs)

    BatchNormLayer.forward = forward  # pyright: ignore[reportAttributeAccessIssue]
    try:
        run()
    finally:
        BatchNormLayer.forward = own
    return fused
