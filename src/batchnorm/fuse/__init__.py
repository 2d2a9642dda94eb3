"""Batch norms run together with the addition and the activation after them, in any forward that can be read.

sequential   nn.Sequential's forward, which finds the pairs as it runs
patterns     what an expression is
source       a method's source, proven to be what was loaded, and its compilation
rewrite      where in that source a batch norm may wait for what follows
reasons      why it does not wait, where an activation comes after it
ending       a forward that ends in a batch norm, which may wait for what the parent does
calls        what the rewritten source calls: everything is decided there, at every call
swap         the class with the rewritten methods, and what was fused or why not
"""

from .sequential import FusedSequential
from .swap import Fusion, explain_fusion, fuse, fused_in, left_over, unfuse

__all__ = ["FusedSequential", "Fusion", "explain_fusion", "fuse", "fused_in", "left_over", "unfuse"]
