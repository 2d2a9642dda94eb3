"""On a GPU: whether a call has the same bits in every run, and as a CUDA graph that is replayed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .cases import Case
from .values import Operands, make, run

RUNS = 100
# Tensors large enough that programs run at the same time in an order that nobody knows; the other walks are of `cases`.
LARGE = (
    Case((64, 256, 28, 28), "contiguous", torch.float32, residual=True),
    Case((64, 256, 28, 28), "last", torch.bfloat16),
    Case((64, 512, 7, 7), "contiguous", torch.bfloat16),
    Case((16, 64, 112, 112), "contiguous", torch.float32),
    Case((65536, 37), "contiguous", torch.float32),
    Case((65536, 256), "contiguous", torch.float32, mask=True, way="steps"),
)


def differences(case: Case) -> list[str]:
    """What differs in some of the runs, or in the graph's; empty where nothing does."""
    operands = make(case, "cuda")

    def call() -> dict[str, Tensor]:
        return _computed(case, operands)

    first, wrong = call(), []
    for number in range(1, RUNS):
        wrong += [f"{name} in run {number}" for name in _different(first, call())]
    replayed, replay = _captured(call)
    for number in range(3):
        replay()
        wrong += [f"{name} in replay {number} of a graph" for name in _different(first, replayed)]
    return wrong


def _computed(case: Case, operands: Operands) -> dict[str, Tensor]:
    # The running statistics move, so that each run has its own.
    fresh = operands._replace(running_mean=operands.running_mean.clone(), running_var=operands.running_var.clone())
    return {name: value for name, value in run(case, fresh).items() if value is not None}


def _different(first: dict[str, Tensor], again: dict[str, Tensor]) -> list[str]:
    return [name for name, value in first.items() if not torch.equal(_bits(value), _bits(again[name]))]


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def _captured(call: Callable[[], dict[str, Tensor]]) -> tuple[dict[str, Tensor], Callable[[], None]]:
    """The results, whose memory a replay of the captured call writes again, and that replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()  # compiled, and its memory found, before it is captured
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    return results, graph.replay
