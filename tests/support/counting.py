"""Which operators of torch run on tensors as large as a call's input: on a device that computes, each is a pass."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_NO_PASS = (
    "device",
    "detach",
    "empty",
    "empty_like",
    "new_empty",
    "new_empty_strided",
    "view",
    "unsqueeze",
    "expand",
    "alias",
)


class Passes(TorchDispatchMode):
    """Notes operators and the dtypes they make; of C values and fewer than `size` the rest."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.operators: list[str] = []
        self.made: set[torch.dtype] = set()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        made = function(*arguments, **(options or {}))
        self.made |= {t.dtype for t in self.large(made)}
        name = function.name().split("::")[1].split(".")[0]
        if name not in _NO_PASS and (self.large(arguments) or self.large(made)):
            self.operators.append(name)
        return made

    def large(self, tree: object) -> list[Tensor]:
        return [t for t in tree_leaves(tree) if isinstance(t, Tensor) and t.numel() >= self.size]
