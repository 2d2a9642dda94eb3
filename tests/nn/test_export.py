"""Eval models written down for programs that have none of our operators: torch.export, ONNX, torch.jit.trace."""

import copy
import warnings

import onnx.reference
import pytest
import torch
from cases import make
from torch import nn

import batchnorm as bn

pytestmark = pytest.mark.slow


def model(**options):
    layer = bn.BatchNorm2d(3, **options)
    layer(make((4, 3, 5, 6)))
    return layer.eval()


def nodes(exported):
    return [n.target for n in exported.run_decompositions().graph.nodes if n.op == "call_function"]


@pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec:FutureWarning")  # torch's own
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"activation": "relu"}])
def test_torch_export_holds_torchs_operators_only(options):
    layer, x = model(**options), make((2, 3, 5, 6))
    exported = torch.export.export(layer, (x,))
    names = [str(target) for target in nodes(exported)]
    assert any("native_batch_norm" in name for name in names)
    assert not any("batchnorm." in name for name in names)
    assert any("relu" in name for name in names) == ("activation" in options)
    torch.testing.assert_close(exported.module()(x), layer(x), rtol=1e-5, atol=1e-5)


def test_torch_export_of_a_low_precision_model():
    layer, x = model(activation="silu").bfloat16(), make((2, 3, 5, 6), torch.bfloat16)
    exported = torch.export.export(layer, (x,))
    torch.testing.assert_close(exported.module()(x), layer(x), rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, ["BatchNormalization"]), ({"activation": "relu"}, ["BatchNormalization", "Relu"])],
)
def test_onnx_gets_the_standard_node(options, expected):
    layer, x = model(**options), make((2, 3, 5, 6))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own
        program = torch.onnx.export(layer, (x,), dynamo=True, verbose=False)
    proto = program.model_proto
    assert [node.op_type for node in proto.graph.node] == expected
    (y,) = onnx.reference.ReferenceEvaluator(proto).run(None, {proto.graph.input[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), layer(x), rtol=1e-5, atol=1e-5)


def test_onnx_of_a_residual_adds_before_it_activates():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = bn.BatchNorm2d(3, activation="relu")

        def forward(self, x):
            return self.bn(x, residual=x)

    block, x = Block().eval(), make((2, 3, 5, 6))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(block, (x,), dynamo=True, verbose=False)
    proto = program.model_proto
    assert [node.op_type for node in proto.graph.node] == ["BatchNormalization", "Add", "Relu"]
    (y,) = onnx.reference.ReferenceEvaluator(proto).run(None, {proto.graph.input[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), block(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_training_model_learns(strict):
    ours = nn.Sequential(nn.Conv2d(2, 3, 3), bn.BatchNorm2d(3))
    theirs = bn.revert(copy.deepcopy(ours))
    x = make((4, 2, 5, 6))
    exported = torch.export.export(ours, (x,), strict=strict).module()
    exported(x).pow(3).sum().backward()
    theirs(x).pow(3).sum().backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in exported.named_parameters():
        # sums of up to 48 cubes of size 10
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-3, atol=1e-2)


def test_fx_takes_a_layer_whole_as_it_does_torchs():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), bn.BatchNorm2d(3), nn.ReLU())
    traced = torch.fx.symbolic_trace(model)
    assert [n.target for n in traced.graph.nodes if n.op == "call_module"] == ["0", "1", "2"]
    x = make((4, 2, 5, 6))
    model.eval()
    assert torch.equal(traced(x), model(x))
