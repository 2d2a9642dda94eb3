"""What torch's own tests ask of SyncBatchNorm on GPUs, asked of ours on the CPU, under the names they have there."""

from __future__ import annotations

import copy
import io

import pytest
import ranks
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import batchnorm as bn

pytestmark = pytest.mark.processes

WORLD = 2


class Net(nn.Module):
    """torch's BatchNormNet: a batch norm between two linear layers, over (N, 4, 10)."""

    def __init__(self, affine=True):
        super().__init__()
        self.fc1 = nn.Linear(2, 40, bias=False)
        self.bn = nn.BatchNorm1d(4, affine=affine)
        self.fc2 = nn.Linear(40, 4, bias=False)

    def forward(self, x):
        x = self.bn(self.fc1(x).reshape(-1, 4, 10))
        return self.fc2(x.reshape(-1, 40)).softmax(1)


def five_steps(rank, model, shape, target, sizes=(2, 2), memory_format=torch.contiguous_format, saved=False):
    """Train five steps, whole on one process and in parallel; returns the largest difference of a parameter."""
    parallel = DistributedDataParallel(bn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model)))
    x, y = (torch.randn(sum(sizes), *s) for s in (shape, target))
    worst = 0.0
    for step in range(5):
        if saved and step == 2:
            buffer = io.BytesIO()
            torch.save(parallel, buffer)
            buffer.seek(0)
            parallel = torch.load(buffer, weights_only=False)
        mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        share = sizes[rank] / sum(sizes) * WORLD  # the loss is a mean, and so is what DDP makes of the gradients
        for trained, part, scale in ((model, slice(None), 1.0), (parallel, mine, share)):
            trained.zero_grad()
            inputs = x[part].contiguous(memory_format=memory_format)
            (nn.functional.mse_loss(trained(inputs), y[part]) * scale).backward()
            for parameter in trained.parameters():
                parameter.data.sub_(0.1 * parameter.grad)
        for ours, theirs in zip(parallel.parameters(), model.parameters(), strict=True):
            worst = max(worst, (ours - theirs).abs().max().item())
        x, y = (values[torch.randperm(len(values))] for values in (x, y))
    return worst


def different_sizes(rank):
    layer = bn.SyncBatchNorm(2, momentum=0.99)
    model = DistributedDataParallel(layer)
    inputs = [torch.ones(2, 1, 10 ** (i + 1)) * torch.tensor([0.1 ** (i - 1), 0.3 ** (i - 1)])[:, None] for i in (0, 1)]
    for _ in range(100):
        model(inputs[rank]).mean().backward()
    joined = torch.cat([x.permute(1, 0, 2).reshape(2, -1) for x in inputs], 1)
    return max(
        (layer.running_mean - joined.mean(1)).abs().max().item(), (layer.running_var - joined.var(1)).abs().max().item()
    )


def half(rank):
    model = DistributedDataParallel(bn.SyncBatchNorm.convert_sync_batchnorm(Net().half()))
    y = model(torch.randn(2, 2, dtype=torch.float16))
    y.sum().backward()
    return y.dtype == torch.float16 and all(p.grad.dtype == torch.float16 for p in model.parameters())


def nested_process_group(rank):
    group = dist.new_group([0])
    model = nn.Sequential(nn.Sequential(nn.ModuleDict({"bn": nn.BatchNorm2d(3)})))
    return bn.SyncBatchNorm.convert_sync_batchnorm(model, group)[0][0]["bn"].process_group == group


def uneven_ends(rank):
    model, steps = DistributedDataParallel(bn.SyncBatchNorm.convert_sync_batchnorm(Net())), 0
    said = ""
    try:
        with model.join(throw_on_early_termination=True):
            for _ in range(5 if rank else 10):
                model(torch.randn(10, 2)).sum().backward()
                steps += 1
    except RuntimeError as error:
        said = str(error)
    dist.barrier()
    expected = "exhausted all inputs" if rank else "Detected at least one rank that exhausted inputs"
    return steps == 5 and expected in said


def training_and_eval(rank):
    layer = bn.SyncBatchNorm(2, momentum=0.99, track_running_stats=False)
    model, gathers = DistributedDataParallel(layer), []
    for trained in (True, False):
        with torch.autograd.profiler.profile() as profile:
            if trained:
                model(torch.randn(10, 2, 4, 4)).sum().backward()
            elif rank == 0:
                layer.eval()(torch.randn(10, 2, 4, 4)).sum().backward()
        gathers.append(any("gather" in event.name for event in profile.function_events))
    dist.barrier()
    return gathers == [True, False]


def inference_on_one_rank(rank):
    layer = bn.SyncBatchNorm(2, momentum=0.99, track_running_stats=False)
    model, x = DistributedDataParallel(layer), torch.randn(10, 2, 4, 4)
    same = rank == 1 or torch.equal(model.eval()(x), copy.deepcopy(layer)(x))
    dist.barrier()
    return same


def empty_input(rank, empty_on):
    model = DistributedDataParallel(nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2)))
    model = bn.SyncBatchNorm.convert_sync_batchnorm(model)
    x = torch.randn(0 if rank == empty_on else 2, 2, 11, 13, requires_grad=True)
    y = model(x)
    y.sum().backward()
    return not y.isnan().any() and all(not p.grad.isnan().any() for p in model.parameters())


CASES = {
    "Channels_Last": lambda rank: five_steps(
        rank, bn.SyncBatchNorm(2, momentum=0.99), (2, 4, 4), (2, 4, 4), memory_format=torch.channels_last
    ),
    "Channels_Last_3d": lambda rank: five_steps(
        rank, bn.SyncBatchNorm(2, momentum=0.99), (2, 4, 4, 4), (2, 4, 4, 4), memory_format=torch.channels_last_3d
    ),
    "SyncBatchNorm": lambda rank: five_steps(rank, Net(), (2,), (4,), saved=True),
    "No_Affine": lambda rank: five_steps(rank, Net(affine=False), (2,), (4,)),
    "2D_Input": lambda rank: five_steps(rank, nn.BatchNorm1d(2), (2,), (2,)),
    "Single_Input_Per_Process": lambda rank: five_steps(rank, nn.BatchNorm1d(2), (2,), (2,), sizes=(1, 1)),
    "Diff_Input_Sizes_Running_Value": different_sizes,
    "Diff_Input_Sizes_gradient": lambda rank: five_steps(rank, Net(), (2,), (4,), sizes=(2, 3)),
    "half": half,
    "process_group": nested_process_group,
    "uneven_inputs_stop_iteration": uneven_ends,
    "training_vs_eval": training_and_eval,
    "inference": inference_on_one_rank,
    "only_empty_input": lambda rank: empty_input(rank, 0),
    "empty_input": lambda rank: empty_input(rank, 1),
}


def all_cases(rank):
    found = {}
    for name, case in CASES.items():
        torch.manual_seed(0)
        found[name] = case(rank)
    return found


@pytest.fixture(scope="module")
def found():
    return ranks.run(all_cases, WORLD)


@pytest.mark.parametrize("name", CASES)
def test_as_torch_tests_it(found, name):
    for of_rank in found:
        if isinstance(of_rank[name], bool):
            assert of_rank[name]
        else:
            assert of_rank[name] <= 1e-6
