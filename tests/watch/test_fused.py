"""A watched model that is fused stays fused, and trains on the same bits as one that nobody watches."""

import copy
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from fusible import BasicBlock
from lookalikes import BatchNormAct2d
from torch import nn

import batchnorm as bn

pytestmark = pytest.mark.slow


def model():
    torch.manual_seed(0)
    return bn.convert(
        nn.Sequential(
            nn.Conv2d(3, 4, 3),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            BasicBlock(4, 8, 2),
            BatchNormAct2d(8, nn.SiLU()),
            nn.Flatten(),
            nn.LazyLinear(2),
        ),
        fuse=True,
    )


@pytest.mark.parametrize("compiled", [False, True])
def test_the_training_computes_the_same_bits_and_stays_fused(compiled, fused_calls, tmp_path):
    batches = torch.randn(4, 6, 3, 10, 10)
    plain = model()
    plain(batches[0])
    watched, kept, fused = copy.deepcopy(plain), [], []
    for each in (plain, watched):
        optimizer = torch.optim.SGD(each.parameters(), 0.1, momentum=0.9)
        run = torch.compile(each, backend="eager") if compiled else each
        context = bn.watch(run, tmp_path / "run", optimizer=optimizer) if each is watched else nullcontext()
        fused_calls.clear()
        with context:
            for x in batches:
                optimizer.zero_grad()
                run(x).square().sum().backward()
                optimizer.step()
        kept.append([t.detach().clone() for t in (*each.parameters(), *each.buffers())])
        fused.append(list(fused_calls))
    assert all(torch.equal(a, b) for a, b in zip(*kept, strict=True))
    assert fused[0] == fused[1]
    if not compiled:
        assert len(fused[0]) == len(batches) * 4
    found = bn.open_run(tmp_path / "run")
    assert found.damage == []
    assert np.isfinite(found.vectors("1", "batch_mean")[1]).all()
    assert np.isfinite(found.vectors("4", "batch_var")[1]).all()
