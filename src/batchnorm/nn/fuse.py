"""A Sequential that runs each batch norm together with the activation that follows it."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module

from .. import activations
from .batchnorm import BatchNorm1d, BatchNorm2d, BatchNorm3d

_FUSIBLE = (BatchNorm1d, BatchNorm2d, BatchNorm3d)


class FusedSequential(nn.Sequential):
    """torch.nn.Sequential, but a batch norm of ours and an activation after it are one operation.

    Which modules run together is found at every call, so that modules can be appended, replaced, sliced and hooked as
    in any Sequential. A layer or activation with a hook runs by itself: the hook sees what it would have seen.

    Example:
        >>> model = FusedSequential(nn.Linear(4, 3), BatchNorm1d(3), nn.ReLU())
        >>> model(torch.randn(8, 4)).min() >= 0
        tensor(True)
    """

    def forward(self, input: Any) -> Any:
        """Run the modules in their order."""
        modules = iter([*pairwise(self), (self[-1], None)] if len(self) else [])
        for module, following in modules:
            if _fuses(module, following):
                input = module(input, activation=following)
                next(modules)
            else:
                input = module(input)
        return input


def _fuses(layer: nn.Module, following: nn.Module | None) -> bool:
    return (
        type(layer) in _FUSIBLE
        and layer.activation == activations.NONE
        and type(following) in activations.MODULES
        and not (_observed(layer) or _observed(following))
    )


def _observed(module: nn.Module | None) -> bool:
    """Whether anybody would notice that the module's own output does not come about."""
    assert module is not None
    own = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return any(own) or bool(torch_module._has_any_global_hook())
