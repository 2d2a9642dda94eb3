"""Batch norms run together with the addition and the activation after them, in any forward that can be read.

sequential   nn.Sequential's forward, which finds the pairs as it runs
syntax       what means the same in every module: names, paths, calls of our helpers
patterns     what an expression is, in a module of which it is known what its attributes are
source       a method's source, proven to be what was loaded, and its compilation
reading      what is known of a module before it runs: its methods' source, and what their attributes are
chains       what a statement does with what may wait
rewrite      where in that source a batch norm may wait for what follows
reasons      why it does not wait, where an activation comes after it
ending       a forward that ends in a batch norm, which may wait for what the parent does
calls        what the rewritten source calls: everything is decided there, at every call
plan         what of a class is rewritten, once for all modules alike
swap         the class with the rewritten methods, which a module gets in place of its own
explain      what is fused in a model, and what is not, with the reason
"""

from .explain import Fusion, explain_fusion, fused_in, left_over
from .sequential import FusedSequential
from .swap import fuse, unfuse

__all__ = ["FusedSequential", "Fusion", "explain_fusion", "fuse", "fused_in", "left_over", "unfuse"]
