"""FrozenBatchNorm2d of detection models: four buffers and no parameter, of a class that is no torch.nn batch norm."""

from __future__ import annotations

from typing import Any

from torch import nn

from ...mixin import BatchNorm
from .adapter import Lookalike, drop_and_act

_VECTORS = ("weight", "bias", "running_mean", "running_var")
_USUAL_EPS = 1e-5  # of classes that have eps only in their forward, like transformers' DetrFrozenBatchNorm2d


class Frozen(Lookalike):
    """Recognized by structure: this covers torchvision's, timm's, detectron2's and transformers' classes.

    Source: torchvision/ops/misc.py, timm/layers/norm_act.py, detectron2/layers/batch_norm.py,
        transformers/models/detr/modeling_detr.py.
    """

    def matches(self, module: nn.Module) -> bool:
        """Buffers weight, bias, running_mean, running_var, of one shape (C,), and no parameter of its own."""
        buffers = module._buffers
        if isinstance(module, BatchNorm) or module._parameters or not all(name in buffers for name in _VECTORS):
            return False
        vectors = [buffers[name] for name in _VECTORS]
        return all(v is not None and v.dim() == 1 and v.shape == vectors[0].shape for v in vectors)  # pyright: ignore[reportOptionalMemberAccess]

    def eps(self, layer: Any) -> float:
        """The layer's eps, or the usual one for classes without the attribute."""
        return getattr(layer, "eps", _USUAL_EPS)

    def after(self, layer: Any) -> list[nn.Module]:
        """The drop and the activation, if the class has them."""
        return drop_and_act(layer)  # of timm's FrozenBatchNormAct2d

    def kept(self, layer: Any) -> str | None:
        """It stays as it is."""
        return "frozen: four buffers, with nothing to measure, track or learn"
