"""What a layer does when another library makes a torch.nn.SyncBatchNorm in its place: it refuses to lose anything."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from .options import Options, beyond_torch

# torch.nn.SyncBatchNorm's, timm's and mmengine's; apex's. They read a layer, and last of all its children.
_REPLACING = ("convert_sync_batchnorm", "convert_syncbn_model")


class Irreplaceable(nn.Module):
    """A layer that has more than what those read of it."""

    def named_children(self) -> Any:
        """Refuse, if a function asks for the children that is about to replace the layer by one which has less."""
        frame = sys._getframe(1)
        while frame is not None and frame.f_code.co_name == "named_children":
            frame = frame.f_back
        if frame is not None and frame.f_code.co_name in _REPLACING:
            _refuse_to_lose(self)
        return super().named_children()


def _refuse_to_lose(layer: Any) -> None:
    has = beyond_torch(layer) if isinstance(getattr(layer, "_batchnorm_options", None), Options) else {}
    lost = [f"{name}={value}" for name, value in has.items() if name != "sync"]
    lost += [f"frozen={'+'.join(layer.frozen)}"] if getattr(type(layer), "_frozen_stats", None) is not None else []
    if lost:
        raise RuntimeError(
            f"convert_sync_batchnorm would replace {layer} by a new layer without {', '.join(lost)}, which is "
            "another model. Use bn.convert(model, sync=True), and remove the call of "
            "convert_sync_batchnorm, such as sync_batchnorm=True of Lightning's Trainer"
        )
