"""The GPU operators as torch sees them, on fake CUDA tensors: what serves a call, and no copies around it."""

import pytest
import torch
from counting import Passes
from torch._subclasses.fake_tensor import FakeTensorMode

import batchnorm as bn
from batchnorm.ops import choose, kernels, plain
from batchnorm.ops.gpu import available

SHAPE = (8, 16, 6, 6)


@pytest.fixture(autouse=True)
def switched_on(monkeypatch):
    monkeypatch.setattr(available, "_why_off", lambda index: None)
    monkeypatch.setattr(available, "_distrusted", [])


@pytest.fixture
def fake():
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
        yield


def settings(**given):
    return choose.Settings(1e-5, bn.activations.parse("relu"), **given)


def test_what_serves_a_call(fake):
    x = torch.empty(SHAPE)
    assert choose.steps(x) is kernels
    assert choose.gpu_serves(x)
    assert not choose.native_at_once(x)
    operands = choose.Operands(x, None, None, None, None)
    assert not choose.serves_native(operands, settings(), True)
    assert not choose.serves_native(operands, settings(virtual_batch=4), False)  # which eval does not have


def test_what_the_kernels_do_not_have(fake):
    x = torch.empty(SHAPE)
    assert choose.steps(x, virtual_batch=4) is plain
    said = {
        row.name: row.why_not
        for row in choose.backends(choose.Operands(x, *[None] * 4), settings(virtual_batch=4), True)
    }
    assert said["gpu"] == "the kernels have no virtual batches"
    assert choose.why_not_gpu(torch.empty(SHAPE, dtype=torch.complex64)) == "the input's dtype is torch.complex64"


def test_ranks_agree_on_their_messages_even_where_one_saw_a_wrong_kernel(fake, monkeypatch):
    operands = choose.Operands(torch.empty(SHAPE), None, None, None, None)
    assert not choose.serves_native_over_ranks(operands)
    monkeypatch.setattr(available, "_distrusted", ["wrong"])
    assert not choose.serves_native_over_ranks(operands)
    assert choose.steps(operands.x) is plain


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_one_operator_each_way_and_no_copies(fake, training, memory_format):
    layer = bn.BatchNorm2d(16, activation="relu").train(training)
    x = torch.empty(SHAPE, memory_format=memory_format)
    with Passes(x.numel()) as passes, torch.no_grad():  # a torch without CUDA has no autograd for its tensors
        y = layer(x, torch.empty_like(x))
    assert passes.operators == ["forward" if training else "infer"]
    assert y.stride() == x.stride()
    operands = choose.Operands(x, layer.weight, layer.bias, None, None)
    statistics = torch.empty(3, 16, dtype=torch.float64)
    with Passes(x.numel()) as passes, torch.no_grad():
        dx, *_ = kernels.backward(torch.empty_like(x), operands, y, statistics, settings(), True, True, True)
    assert passes.operators == ["backward"]
    assert dx is not None
    assert dx.stride() == x.stride()


@pytest.mark.slow
def test_a_compiled_call_asks_once_and_has_no_break():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"), torch.no_grad():
        layer = bn.BatchNorm2d(16, activation="relu").eval()
        torch.compile(layer, backend=backend, fullgraph=True)(torch.empty(SHAPE))
    called = [str(node.target) for node in graphs[0].graph.nodes]
    assert any("infer" in name for name in called), called
