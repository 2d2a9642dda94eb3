"""convert(fuse=True) on forwards of a model's own: the same numbers as before, and the same model to everybody else."""

import copy
import io
import pickle

import pytest
import torch
from cases import make
from compare import assert_close
from fusible import BLOCKS, BasicBlock, Bottleneck, Cifar, ConvBNReLU, DenseLayer, InvertedResidual, PreActivation, Timm
from torch import fx, nn

import batchnorm as bn

SHAPE = (4, 4, 6, 6)


def step(model, x, training):
    model.train(training).zero_grad()
    x = x.to(next(model.parameters()).dtype, copy=True).requires_grad_()
    y = model(x)
    y.square().sum().backward()
    return [y, x.grad, *(p.grad for p in model.parameters()), *model.buffers()]


@pytest.mark.parametrize("outputs", [4, 8])
@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.__name__)
def test_values_gradients_and_statistics_are_those_of_the_model_before(block, outputs, fused_calls):
    if block is DenseLayer:
        outputs = 8
    torchs = nn.Sequential(block(4, outputs))
    exact = copy.deepcopy(torchs).double()
    fused = bn.convert(copy.deepcopy(torchs), fuse=True)
    assert not [why for fusion in bn.nn.explain_fusion(fused).values() for why in fusion.left]
    for training in (True, False):
        x = make(SHAPE)
        for a, b, c in zip(*(step(model, x, training) for model in (torchs, fused, exact)), strict=True):
            if b.is_floating_point():
                assert_close(b, c, peer=a, ulps=600)  # gradients add up a term for each of up to 600 positions
            else:
                assert torch.equal(a, b)
    assert len(fused_calls) == 2 * BLOCKS[block][outputs != 4]
    assert any(fused_calls) == (block not in (InvertedResidual, DenseLayer, PreActivation))
    said = [text for fusion in bn.nn.explain_fusion(fused).values() for text in fusion.fused]
    assert any("add" in text for text in said) == any(fused_calls)


def test_only_the_class_changes_and_revert_undoes_it():
    model = nn.Sequential(BasicBlock(4, 8, 2), ConvBNReLU(8, 8), Timm(8, 8))
    classes = [type(m) for m in model.modules()]
    before = [(n, id(p)) for n, p in [*model.named_modules(), *model.named_parameters(), *model.named_buffers()]]
    keys, text = list(model.state_dict()), repr(model)
    attributes = [set(m.__dict__) for m in model.modules()]
    bn.convert(model, fuse=True)
    assert before == [
        (n, id(p)) for n, p in [*model.named_modules(), *model.named_parameters(), *model.named_buffers()]
    ]
    assert list(model.state_dict()) == keys
    assert repr(model).replace("FusedSequential", "Sequential").replace("bias=True, ", "") == text.replace(
        "bias=True, ", ""
    )
    assert isinstance(model[0], BasicBlock)
    assert isinstance(model[1], ConvBNReLU)
    assert type(model[0]) is not BasicBlock
    assert [set(m.__dict__) for m in model.modules()] == attributes
    once = [type(m) for m in model.modules()]
    assert [type(m) for m in bn.convert(model, fuse=True).modules()] == once
    assert [type(m) for m in bn.revert(model).modules()] == classes
    assert [set(m.__dict__) for m in model.modules()] == attributes


def test_modules_alike_share_one_class():
    model = bn.convert(nn.Sequential(BasicBlock(4, 4), BasicBlock(4, 4), BasicBlock(4, 8)), fuse=True)
    assert type(model[0]) is type(model[1])


@pytest.mark.parametrize("block", [BasicBlock, Timm, ConvBNReLU])
def test_copies_and_pickles_are_fused_too(block, fused_calls):
    model = bn.convert(nn.Sequential(block(4, 4)), fuse=True).eval()
    x = make(SHAPE)
    expected = model(x)
    fused = len(fused_calls)
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    for other in (
        copy.deepcopy(model),
        copy.copy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(saved, weights_only=False),  # what this very test wrote
    ):
        fused_calls.clear()
        assert torch.equal(other(x), expected)
        assert len(fused_calls) == fused > 0
        assert isinstance(other[0], block)
        assert type(bn.revert(other)[0]) is block
        bn.convert(model, fuse=True)  # the shallow copy shares its children


class Custom(BasicBlock):
    """Pickles itself by its arguments, holds on to itself, and leaves something out."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.arguments = inputs, outputs
        self.itself = [self]
        self.cache = object()

    def __getstate__(self):
        return {k: v for k, v in self.__dict__.items() if k != "cache"}

    def __setstate__(self, state):
        super().__setstate__(state)
        self.cache = "restored"

    def __reduce__(self):
        return self.__class__, self.arguments, self.__getstate__()


def test_a_class_that_pickles_in_its_own_way_still_does():
    model = bn.convert(Custom(4, 4), fuse=True).eval()
    x = make(SHAPE)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other) is type(model)
        assert other.itself[0] is other
        assert other.cache == "restored"
        assert torch.equal(other(x), model(x))


def test_weights_load_both_ways():
    torchs, fused = BasicBlock(4, 4), bn.convert(BasicBlock(4, 4), fuse=True)
    saved = io.BytesIO()
    torch.save(torchs.state_dict(), saved)
    saved.seek(0)
    fused.load_state_dict(torch.load(saved, weights_only=True))
    torchs.load_state_dict(fused.state_dict())


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck, Timm])
def test_under_autocast_it_computes_what_it_did(block):
    """The convolution gives bfloat16, the identity is float32: a sum in place stays bfloat16, the other does not."""
    plain = bn.convert(block(4, 4))
    fused = bn.convert(copy.deepcopy(plain), fuse=True)
    exact = copy.deepcopy(plain).double()
    x = make(SHAPE)
    with torch.autocast("cpu", torch.bfloat16):
        a, b = plain(x), fused(x)
    assert a.dtype == b.dtype == (torch.float32 if block is Bottleneck else torch.bfloat16)
    assert_close(b, exact(x.double()), peer=a)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_recomputes_the_same(reentrant):
    model = bn.convert(BasicBlock(4, 4), fuse=True)
    twin = copy.deepcopy(model)
    x = make(SHAPE).requires_grad_()
    gradients = []
    for y in (model(x), torch.utils.checkpoint.checkpoint(twin, x, use_reentrant=reentrant)):
        y.square().sum().backward()
        gradients.append(x.grad)
        x.grad = None
    assert torch.equal(*gradients)


def test_dense_layers_checkpoint_in_their_own_forward():
    model = bn.convert(DenseLayer(4, 8), fuse=True)
    twin = copy.deepcopy(model)
    twin.memory_efficient = True  # set after it was fused
    x = make(SHAPE)
    for a, b in zip(step(model, x, True)[:-6], step(twin, x, True)[:-6], strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("block", [BasicBlock, Cifar, Timm])
def test_it_compiles_without_a_graph_break(block):
    torch._dynamo.reset()
    model = bn.convert(nn.Sequential(block(4, 8)), fuse=True)
    twin = copy.deepcopy(model)
    x = make(SHAPE)
    compiled = torch.compile(twin, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), model(x))


@pytest.mark.slow
def test_frozen_layers_are_fused_and_stay_frozen(fused_calls):
    model = bn.freeze(bn.convert(BasicBlock(4, 8), fuse=True)).train()
    twin = copy.deepcopy(model).eval()
    x = make(SHAPE)
    assert torch.equal(model(x), twin(x))
    assert fused_calls == [False, True] * 2
    torch._dynamo.reset()
    assert torch.equal(torch.compile(model, fullgraph=True, backend="eager")(x), twin(x))


@pytest.mark.slow
@pytest.mark.parametrize("strict", [True, False])
def test_an_eval_model_exports(strict):
    model = bn.convert(nn.Sequential(BasicBlock(4, 8)), fuse=True).eval()
    x = make(SHAPE)
    program = torch.export.export(model, (x,), strict=strict)
    assert "batchnorm" not in program.graph_module.code
    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-5, atol=1e-5)


def test_torch_fx_sees_the_source_as_it_was():
    plain = bn.convert(BasicBlock(4, 8))
    fused = bn.convert(copy.deepcopy(plain), fuse=True)
    graphs = [fx.symbolic_trace(model) for model in (plain, fused)]
    assert graphs[0].code == graphs[1].code


def test_torch_func_and_inference_mode():
    model = bn.convert(BasicBlock(4, 4), fuse=True).eval()
    x = make(SHAPE)
    parameters = dict(model.named_parameters())

    def loss(parameters):
        return torch.func.functional_call(model, parameters, (x,)).square().sum()

    gradients = torch.func.grad(loss)(parameters)
    loss(parameters).backward()
    for name, p in parameters.items():
        torch.testing.assert_close(gradients[name], p.grad, rtol=1e-5, atol=1e-4)
    with torch.inference_mode():
        assert torch.equal(model(x), model(x))
