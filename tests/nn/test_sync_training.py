"""Synchronized layers in training: DistributedDataParallel, uneven ends, activation checkpointing, torch.compile."""

from __future__ import annotations

import pytest
import ranks
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import batchnorm as bn

pytestmark = pytest.mark.processes

WORLD, STEPS = 3, 4


class Net(nn.Module):
    """Two synchronized layers, one of them recomputed in backward if asked for."""

    def __init__(self, reentrant=None, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(3, 4, bias=False)
        self.block = nn.Sequential(nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.reentrant = reentrant
        self.to(dtype)

    def forward(self, x):
        x = self.stem(x)
        return self.block(x) if self.reentrant is None else checkpoint(self.block, x, use_reentrant=self.reentrant)


def batches(step):
    """Each rank's batch of a step: uneven, one of them empty, and at the last step two."""
    generator = torch.Generator().manual_seed(step)
    sizes = [4, 2, 3] if step == 0 else [5, 0, 1] if step < STEPS - 1 else [3, 0, 0]
    return [torch.randn(n, 3, dtype=torch.float64, generator=generator) for n in sizes]


def train(model, optimizer, samples, total, scale):
    """One step on the mean over `total` samples of a loss; DDP averages over ranks, hence the scale."""
    loss = model(samples).cos().sum() / total * scale
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def data_parallel(rank, reentrant):
    model = bn.convert(Net(reentrant), sync=True, fuse=True)
    parallel = DistributedDataParallel(model, broadcast_buffers=False)
    optimizer = torch.optim.SGD(parallel.parameters(), 0.1, momentum=0.9)
    for step in range(STEPS):
        parts = batches(step)
        train(parallel, optimizer, parts[rank], sum(map(len, parts)), WORLD)
    return model.state_dict()


@pytest.mark.parametrize("reentrant", [None, True, False])
def test_data_parallel_training_ends_where_one_process_does(reentrant):
    model = Net()  # torch's layers, on the joined batches
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for step in range(STEPS):
        whole = torch.cat(batches(step))
        train(model, optimizer, whole, len(whole), 1)
    found = ranks.run(data_parallel, WORLD, reentrant)
    for state in found:
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(state[name], tensor, rtol=0, atol=1e-12)
        for name, tensor in state.items():
            assert torch.equal(tensor, found[0][name])


def compiled(rank):
    """A step of a layer, as it is and compiled: output, gradients, running variance, and each one's graphs."""
    found = []
    for backend in (None, "aot_eager"):
        layer = bn.SyncBatchNorm(3)
        torch.manual_seed(rank)
        x = torch.randn(3 + rank, 3, requires_grad=True)
        call = layer if backend is None else torch.compile(layer, fullgraph=True, backend=backend)
        y = call(x)
        y.cos().sum().backward()
        found.append((y.detach(), x.grad, layer.weight.grad, layer.running_var, layer.num_batches_tracked))
    return found


def test_compiles_to_one_graph_with_its_collectives():
    for eager, graph in ranks.run(compiled, 2, timeout=60.0, seconds=120.0):
        for theirs, ours in zip(eager, graph, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
