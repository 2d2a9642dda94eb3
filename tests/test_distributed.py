"""Running statistics pooled over ranks, and ranks whose data ends at different steps, in real processes."""

from __future__ import annotations

import pytest
import ranks
import torch
import torch.distributed as dist
from compare import assert_close
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import batchnorm as bn
from batchnorm.distributed import in_step

WORLD = 3


def batches(rank):
    """As many as the rank's number, each rank's around a mean of its own: the first has none."""
    torch.manual_seed(rank)
    return [torch.randn(50, 2) * (1 + rank) + 10 * rank for _ in range(rank)]


def pooled(rank):
    model = nn.Sequential(
        nn.BatchNorm1d(2, momentum=None), bn.BatchNorm1d(2, momentum=None), nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    )
    alone = nn.BatchNorm1d(2, track_running_stats=False)
    model[2].num_batches_tracked, model[2].running_mean = None, torch.full((2,), float(rank))
    for batch in batches(rank):
        for layer in model[:2]:
            layer(batch)
    before = [{k: v.clone() for k, v in layer.state_dict().items()} for layer in model]
    with ranks.counting(counted := {}):
        bn.pool_buffers(nn.Sequential(model, alone))
    return before, [layer.state_dict() for layer in model], sum(counted.values())


def mean_of(batch):
    return batch.mean(0)


def var_of(batch):
    return batch.var(0)


@pytest.mark.processes
def test_pooled_buffers_are_those_of_all_ranks_data():
    found = ranks.run(pooled, WORLD)
    own = [[torch.stack([of(b.double()) for b in batches(r)]).mean(0) for of in (mean_of, var_of)] for r in (1, 2)]
    mean = (own[0][0] + 2 * own[1][0]) / 3
    var = (own[0][1] + (own[0][0] - mean) ** 2 + 2 * (own[1][1] + (own[1][0] - mean) ** 2)) / 3
    for rank, (before, after, calls) in enumerate(found):
        assert calls == 1
        for layer in (0, 1):
            assert_close(after[layer]["running_mean"], mean)
            assert_close(after[layer]["running_var"], var)
            assert after[layer]["num_batches_tracked"] == before[layer]["num_batches_tracked"] == rank
        # Ranks weigh the same in a layer that does not count: 0, 1 and 2, with a variance of 1 in each.
        assert_close(after[2]["running_mean"], torch.ones(2).double())
        assert_close(after[2]["running_var"], torch.full((2,), 1 + 2 / 3).double())
        for name, value in after[3].items():  # no rank has trained it
            assert torch.equal(value, before[3][name])
        assert all(torch.equal(after[0][n], found[0][1][0][n]) for n in ("running_mean", "running_var"))
    averaged = torch.stack([before[0]["running_var"] for before, *_ in found[1:]]).mean(0)
    assert (var > 4 * averaged).all()  # what averaging would have lost


def shares(rank):
    """Three batches on the first rank, one on the others."""
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(2, 3, dtype=torch.float64, generator=generator) for _ in range(3 if rank == 0 else 1)]


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()


def step(model, optimizer, loss):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def trained(rank):
    model = bn.convert(network(), sync=True)
    parallel = DistributedDataParallel(model, broadcast_buffers=False)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    sizes = []
    for batch in in_step([{"x": x, "name": "kept"} for x in shares(rank)]):
        sizes.append(len(batch["x"]))
        step(model, optimizer, parallel(batch["x"]).cos().sum() * WORLD)  # DDP divides by the ranks
    return sizes, model.state_dict()


@pytest.mark.processes
def test_ranks_whose_data_ends_earlier_stay_in_step():
    found = ranks.run(trained, WORLD)
    assert [sizes for sizes, _ in found] == [[2, 2, 2], [2, 0, 0], [2, 0, 0]]
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for index in range(3):
        whole = torch.cat([x for rank in range(WORLD) for x in shares(rank)[index : index + 1]])
        step(model, optimizer, model(whole).cos().sum())
    for _, state in found:
        for name, value in model.state_dict().items():
            torch.testing.assert_close(state[name], value, rtol=0, atol=1e-12)


def ends(rank):
    """What a rank without batches gives, and torch's own join."""
    try:
        list(in_step([] if rank == 0 else [torch.ones(2)]))
    except ValueError as error:
        message = str(error)
    parallel, steps = DistributedDataParallel(bn.convert(network(), sync=True)), 0
    try:
        with parallel.join(throw_on_early_termination=True):
            for x in shares(rank):
                parallel(x).sum().backward()
                steps += 1
    except RuntimeError as error:
        return message, str(error), steps
    finally:
        dist.barrier()


@pytest.mark.processes
def test_a_rank_without_batches_and_torchs_join():
    found = ranks.run(ends, WORLD)
    assert {message for message, *_ in found} == {
        "every rank needs at least one batch, but this one has none: give it one, empty if necessary"
    }
    assert [steps for *_, steps in found] == [1, 1, 1]
    assert "Detected at least one rank that exhausted inputs" in found[0][1]
    assert all("exhausted all inputs" in error for _, error, _ in found[1:])


def test_alone_nothing_is_done():
    layer = nn.BatchNorm1d(2)
    layer(torch.randn(4, 2))
    before = layer.running_var.clone()
    bn.pool_buffers(layer)
    assert torch.equal(layer.running_var, before)
    assert [len(x) for x in in_step([torch.ones(2), torch.ones(1)])] == [2, 1]
    with pytest.raises(TypeError):
        list(in_step(None))
