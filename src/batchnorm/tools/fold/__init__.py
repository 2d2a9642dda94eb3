"""Batch norms folded into the layers beside them.

folding      the tool and its report
calls        which layer feeds which, by torch.fx
neighbors   which layer a batch norm can be folded into, and why it cannot
weights      the arithmetic
verify       the two models compared on example inputs
"""

from .folding import Folding, fold

__all__ = ["Folding", "fold"]
