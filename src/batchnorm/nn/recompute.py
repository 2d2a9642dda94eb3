"""recomputing(): whether autograd is running a forward a second time, so that a layer tracks a batch once."""

from __future__ import annotations

import torch

_current_graph_task_id = torch._C._current_graph_task_id
_is_dynamo_compiling = torch.compiler.is_dynamo_compiling


def recomputing() -> bool:
    """Whether this code runs inside a backward pass.

    A forward of a layer that runs there is a recomputation: torch.utils.checkpoint, reentrant or not, other libraries'
    checkpointing and reversible networks all throw activations away and compute them again when backward asks for
    them. The batch was tracked the first time.

    The rule is that of torch.utils.checkpoint itself: autograd numbers each backward pass, and outside of one the
    number is -1. It is per thread and known to the engine's device threads too. Inside a compiled graph the answer is
    False: there the buffers are written once, at the end of the forward, whatever the graph recomputes. (What stays
    unseen is a compiled module inside an eager checkpoint: compile what contains the checkpoint instead.)

    Example:
        >>> seen = []
        >>> x = torch.ones(1, requires_grad=True)
        >>> hook = x.register_hook(lambda gradient: seen.append(recomputing()))
        >>> x.square().backward()
        >>> recomputing(), seen
        (False, [True])
    """
    return not _is_dynamo_compiling() and _current_graph_task_id() != -1
