"""Whatever a tool could leave behind in a model, running statistics apart: compared before and after."""

from __future__ import annotations

from typing import Any

from torch import nn


def everything(model: nn.Module) -> Any:
    """Modules, their classes, modes and attributes; parameters, their values, requires_grad and gradients."""
    return (
        [(n, id(m), type(m), m.training, sorted(vars(m)), repr(m)) for n, m in model.named_modules()],
        [(n, id(p), p.requires_grad, id(p.grad), p.tolist()) for n, p in model.named_parameters()],
    )
