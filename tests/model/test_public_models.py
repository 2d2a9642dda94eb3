"""Models as timm builds them, with random weights: what is done to them computes what torch computes."""

import copy

import pytest
import torch
from public import import_timm
from zoo.check import fusion
from zoo.pairs import is_norm, watch
from zoo.steps import WIDE, Torchs, call, errors, step, take_out_chance, too_far, train_a_little

import batchnorm as bn

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

# Small ones of many families: BatchNormAct2d, plain batch norms, branches that are added, subclasses of nn.Sequential.
NAMES = [
    "test_efficientnet",
    "test_resnet",
    "test_byobnet",
    "lcnet_050",
    "tinynet_e",
    "mobilenetv3_small_050",
    "mobilenetv4_conv_small_050",
    "regnety_002",
    "dla46_c",
    "resnet10t",
    "ese_vovnet19b_dw",
    "hgnetv2_b0",
]


@pytest.fixture(scope="module", params=NAMES)
def model(request):
    torch.manual_seed(0)
    model = import_timm().create_model(request.param, pretrained=False)
    take_out_chance(model)
    train_a_little(model)
    return model


@pytest.fixture(scope="module")
def x():
    """Four images: of two values a channel, as deep layers would see of two, batch norm keeps little but the sign."""
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def torchs(model, x):
    return Torchs(model, x)


def same(found, exact):
    assert max(errors(found, exact).values()) <= WIDE


@pytest.mark.parametrize("fuse", [False, True])
def test_a_converted_model_trains_as_the_original_does(model, x, torchs, fuse):
    converted = bn.convert(copy.deepcopy(model), fuse=fuse)
    assert all(is_ours(module) for module in converted.modules() if is_norm(module))
    assert converted.state_dict().keys() == model.state_dict().keys()
    same(step(bn.convert(copy.deepcopy(torchs.wide), fuse=fuse), x.double()), torchs.exact(0))
    assert too_far(converted, torchs) == ""


@pytest.mark.parametrize("fuse", [False, True])
def test_a_reverted_model_is_the_original(model, x, torchs, fuse):
    reverted = bn.revert(bn.convert(copy.deepcopy(model), fuse=fuse))
    assert [type(module) for module in reverted.modules()] == [type(module) for module in model.modules()]
    for name, error in errors(step(reverted, x), torchs.narrow(0)).items():
        assert error == 0, name


def test_activations_run_with_their_batch_norm_or_are_named(model, x):
    found = fusion(model, x)
    assert found["neither"] == []
    assert found["fused"] == found["pairs"] > 0


def test_a_folded_model_computes_the_same_without_its_batch_norms(model, x):
    wide = copy.deepcopy(model).double().eval()
    before = {name: tensor.clone() for name, tensor in wide.state_dict().items()}
    with torch.no_grad():
        seen = watch(wide, lambda: call(wide, x.double()))
        folded = bn.fold(wide, x.double())
        outputs = [dict(enumerate(call(each, x.double()))) for each in (folded, wide)]
    same(*outputs)
    assert seen.foldable
    assert seen.foldable <= folded.folding.folded.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in wide.state_dict().items())


def test_every_batch_norm_is_diagnosed(model):
    sick = copy.deepcopy(model)
    names = [name for name, module in sick.named_modules() if is_norm(module)]
    for module in filter(is_norm, sick.modules()):
        module.running_var.fill_(float("nan"))
    findings = bn.diagnose(sick)
    assert set(names) <= {name for finding in findings.serious for name in finding.layers}


def is_ours(module):
    return isinstance(module, (bn.BatchNorm2d, bn.BatchNorm1d)) or hasattr(type(module), "_batchnorm_options")
