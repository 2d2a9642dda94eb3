"""A Sequential that runs each batch norm together with the activation that follows it."""

from __future__ import annotations

from typing import Any

from torch import nn

from .calls import computed, run_in_order


class FusedSequential(nn.Sequential):
    """torch.nn.Sequential that runs a batch norm of ours and the activation after it as one operation.

    Which modules run together is found at every call, so that modules can be appended, replaced, sliced and hooked as
    in any Sequential. A layer or activation with a hook runs by itself: the hook sees what it would have seen.

    Example:
        >>> model = FusedSequential(nn.Linear(4, 3), bn.BatchNorm1d(3), nn.ReLU())
        >>> model(torch.randn(8, 4)).min() >= 0
        tensor(True)
    """

    runs_in_order = True

    def forward(self, input: Any) -> Any:
        """Run the modules in their order."""
        return computed(run_in_order(self, input))
