"""Which batch-norm layers are given features in another dimension than the one that they normalize."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..mixin import option
from ..model.adapters import adapter_of

_LAST_AXIS = (nn.Linear, nn.Embedding, nn.LayerNorm)  # their features are in the last dimension
# Modules whose output has its features where the input has them.
_ELEMENTWISE = (nn.Dropout, nn.Identity, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Sigmoid, nn.Tanh)


@contextmanager
def tracing_features(model: nn.Module, sources: dict[nn.Module, str]) -> Iterator[None]:
    """Inside the block, note where the input of each batch-norm layer comes from, if that has them elsewhere."""
    marked: dict[int, tuple[Tensor, str]] = {}  # tensors are kept, so that no other has the number of one that is gone

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0] if args else None
        at_last = isinstance(x, Tensor) and option(module, "channel_dim", 1) % x.dim() == x.dim() - 1
        if isinstance(x, Tensor) and id(x) in marked and not at_last:
            sources[module] = marked[id(x)][1]

    def mark(name: str, module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        if isinstance(module, _LAST_AXIS) and isinstance(out, Tensor) and out.dim() > 2:
            marked[id(out)] = out, f"{name} ({type(module).__name__})"
        elif isinstance(module, nn.RNNBase) and isinstance(out, tuple) and isinstance(out[0], Tensor):
            marked[id(out[0])] = out[0], f"{name} ({type(module).__name__})"
        elif isinstance(module, _ELEMENTWISE) and args and id(args[0]) in marked and isinstance(out, Tensor):
            marked[id(out)] = out, marked[id(args[0])][1]

    with ExitStack() as stack:
        for name, module in model.named_modules():
            if adapter_of(module):
                hook = module.register_forward_pre_hook(note)
            else:
                hook = module.register_forward_hook(partial(mark, name))
            stack.callback(hook.remove)
        yield
