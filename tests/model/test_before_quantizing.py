"""What docs/exporting.md promises: to torch's tools a reverted and unfrozen model is one of torch's."""

import copy
import pickle
import sys

import pytest
import torch
from torch import nn
from torch.ao.quantization import (
    fuse_modules,
    fuse_modules_qat,
    get_default_qat_qconfig_mapping,
    get_default_qconfig_mapping,
)
from torch.ao.quantization.quantize_fx import convert_fx, fuse_fx, prepare_fx, prepare_qat_fx
from torch.fx.experimental import optimization

import batchnorm as bn

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    # of quantization's own observers and tensors
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning"),
    pytest.mark.filterwarnings("ignore:Please use quant_min and quant_max:UserWarning"),
    pytest.mark.filterwarnings("ignore:reduce_range will be deprecated:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning"),
]

EXAMPLE = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def net():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    model(EXAMPLE * 2 + 1)
    return model.eval()


def quantized(model):
    prepared = prepare_fx(model, get_default_qconfig_mapping(), (EXAMPLE,))
    prepared(EXAMPLE)
    return convert_fx(prepared)


TOOLS = {
    "fuse_modules": lambda m: fuse_modules(m, [["0", "1", "2"], ["3", "4"]]),
    "fuse_modules_qat": lambda m: fuse_modules_qat(m.train(), [["0", "1", "2"], ["3", "4"]]).eval(),
    "fuse_fx": fuse_fx,
    "prepare_fx, convert_fx": quantized,
    "prepare_qat_fx": lambda m: prepare_qat_fx(m.train(), get_default_qat_qconfig_mapping(), (EXAMPLE,)).eval(),
    "optimization.fuse": optimization.fuse,
    "jit.script": torch.jit.script,
    "jit.freeze": lambda m: torch.jit.freeze(torch.jit.script(m)),
}
CHANGED = {
    "converted": bn.convert,
    "fused": lambda m: bn.convert(m, fuse=True),
    "synchronized": lambda m: bn.convert(m, sync=True, nonfinite="skip"),
    "frozen": lambda m: bn.freeze(m, affine=True),
    "frozen, converted": lambda m: bn.convert(bn.freeze(m), fuse=True),
    "converted, frozen": lambda m: bn.freeze(bn.convert(m), affine=True),
}


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("changed", CHANGED)
def test_a_reverted_model_is_to_every_tool_what_it_was(changed, tool):
    expected = TOOLS[tool](net())
    found = TOOLS[tool](bn.unfreeze(bn.revert(CHANGED[changed](net()))))
    assert [type(m).__name__ for m in found.modules()] == [type(m).__name__ for m in expected.modules()]
    assert torch.equal(found(EXAMPLE), expected(EXAMPLE))


@pytest.mark.parametrize("changed", CHANGED)
def test_classes_are_exactly_torchs_and_values_stay(changed):
    model = CHANGED[changed](net())
    layers, before = list(model), copy.deepcopy(model.state_dict())
    bn.unfreeze(bn.revert(model))
    assert [type(m) for m in model] == [type(m) for m in net()]
    assert type(model) is nn.Sequential
    assert all(m is layer for m, layer in zip(model, layers, strict=True))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [sorted(vars(m)) for m in model.modules()] == [sorted(vars(m)) for m in net().modules()]


def test_a_reverted_model_is_unpickled_without_the_library(monkeypatch):
    stored = pickle.dumps(bn.unfreeze(bn.revert(bn.freeze(bn.convert(net(), fuse=True)))))
    for name in [name for name in sys.modules if name.split(".")[0] == "batchnorm"]:
        monkeypatch.setitem(sys.modules, name, None)
    assert torch.equal(pickle.loads(stored)(EXAMPLE), net()(EXAMPLE))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("changed", CHANGED)
def test_what_needs_no_revert(changed):
    expected, model = net()(EXAMPLE), CHANGED[changed](net())
    traced = torch.jit.trace(model, EXAMPLE)
    exported = torch.export.export(model, (EXAMPLE,))
    assert {n.target for n in exported.graph.nodes if n.op == "call_function"} <= {
        torch.ops.aten.conv2d.default,
        torch.ops.aten.batch_norm.default,
        torch.ops.aten.relu.default,
    }
    for run in (traced, exported.module(), torch.fx.symbolic_trace(model)):
        torch.testing.assert_close(run(EXAMPLE), expected)
