"""timm's BatchNormAct2d: a batch norm, drop and activation in one module, all of them known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ...mixin import BatchNorm, original_class
from .adapter import Adapter, drop_and_act

_CLASSES = ("BatchNormAct2d", "SyncBatchNormAct")


class NormAct(Adapter):
    """BatchNormAct2d and SyncBatchNormAct of timm, and subclasses that leave their forward as it is.

    Source: timm/layers/norm_act.py, versions 0.9 to 1.0: batch norm, then self.drop, then self.act.
    """

    def matches(self, module: nn.Module) -> bool:
        """By the class that defines the forward."""
        if not isinstance(module, BatchNorm):
            return False
        cls = original_class(module)
        owner = next(kind for kind in cls.__mro__ if "forward" in vars(kind))
        return owner.__name__ in _CLASSES and owner.__module__.split(".")[0] == "timm"

    def after(self, layer: Any) -> list[nn.Module]:
        """The drop and the activation."""
        return drop_and_act(layer)

    def forward(self, layer: Any) -> Callable[..., Tensor] | None:
        """Batch norm, drop and activation; the activation is fused into the batch norm if nothing is between them."""
        return forward


def forward(layer: Any, x: Tensor, normalize: Callable[..., Tensor], fused: Callable[[nn.Module], Any]) -> Tensor:
    """Batch norm, drop and act: one operation if there is no drop and the activation can be fused."""
    drop, act = layer._modules.get("drop"), layer._modules.get("act")
    if (drop is None or type(drop) is nn.Identity) and act is not None:
        activation = fused(act)
        if activation is not None:
            return normalize(layer, x, activation=activation)
    y = normalize(layer, x)
    for part in (drop, act):
        y = y if part is None else part(y)
    return y
