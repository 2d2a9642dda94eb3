"""Compiled, our operators take tensors as they lie: Inductor copies nothing around them."""

import re

import pytest
import torch
from torch import nn
from torch._functorch import config as aot_config
from torch._inductor import config
from torch._inductor.utils import run_and_get_code

import batchnorm as bn

pytestmark = [pytest.mark.processes, pytest.mark.slow]


def launches(cls):
    """How many kernels Inductor wrote and calls, going forward and backward."""
    torch._dynamo.reset()
    conv = [nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 4, 1)]
    model = torch.compile(nn.Sequential(conv[0], cls(8), nn.ReLU(), conv[1], cls(8), nn.ReLU(), conv[2]))
    x = torch.randn(4, 3, 16, 16)  # channels first; Inductor runs convolutions channels last
    _, sources = run_and_get_code(lambda: model(x).sum().backward())
    assert len(sources) == 2
    return [len(re.findall(r"^ +cpp_fused\w*\(", source.partition("def call(")[2], re.MULTILINE)) for source in sources]


@pytest.mark.skipif(not hasattr(torch.Tag, "flexible_layout"), reason="this torch has no tag that says so")
def test_no_more_kernels_than_around_torch_nns():
    """Beside our operators there are those for the activation: a copy before each, without the tag, is one more."""
    # What was compiled before may be from operators with other tags.
    with config.patch(fx_graph_cache=False), aot_config.patch(enable_autograd_cache=False):
        (forward, backward), theirs = launches(bn.BatchNorm2d), launches(nn.BatchNorm2d)
    assert forward > 0
    assert backward > 0
    assert forward <= theirs[0]
    assert backward <= theirs[1]
