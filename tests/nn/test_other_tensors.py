"""Tensors kept, laid out or computed in another way: saved_tensors_hooks, oneDNN's layout, parametrizations."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm
from torch.optim.swa_utils import AveragedModel

import batchnorm as bn

MASK = torch.arange(6) < 4
CALLS = {
    "usual": ({}, {}),
    "mask": ({}, {"mask": MASK}),
    "virtual batches": ({"virtual_batch_size": 4}, {}),
    "cumulative": ({"momentum": None, "activation": "relu"}, {}),
    "eval": ({}, {}),
}


def gradients(name, hooks):
    options, given = CALLS[name]
    layer = bn.BatchNorm1d(3, **options).train(name != "eval")
    layer.running_mean.fill_(1e5)
    torch.manual_seed(0)
    # Whole numbers of at most 11 bits, which float16 has; what is measured of them, 8 * 6 * 500**2, it has not.
    x = torch.randint(-1000, 1000, (8, 3, 6)).float().requires_grad_()
    with hooks:
        y = layer(x, **given)
    y.backward(torch.randn(y.shape))
    return x.grad, layer.weight.grad, layer.bias.grad


def halves():
    return torch.autograd.graph.saved_tensors_hooks(
        lambda t: (t.half() if t.is_floating_point() else t, t.dtype), lambda kept: kept[0].to(kept[1])
    )


def as_they_are():
    return torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)


@pytest.mark.kernels  # torch's operators save what they measured
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("hooks", [halves, torch.autograd.graph.save_on_cpu])
def test_statistics_are_not_given_to_hooks_that_keep_half_of_them(hooks, name):
    for ours, expected in zip(gradients(name, hooks()), gradients(name, as_they_are()), strict=True):
        assert expected.isfinite().all()
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("activation", [None, "relu", "gelu", "tanh"])
@pytest.mark.parametrize("cls", ["BatchNorm2d", "BatchNorm3d"])
def test_onednns_layout_in_eval(cls, activation):
    theirs, ours = getattr(nn, cls)(3).eval(), getattr(bn, cls)(3, activation=activation).eval()
    for tensor in (*theirs.parameters(), *theirs.buffers()):
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.5, 1.5)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn((4, 3, 5, 5, 2)[: 2 + int(cls[-2])]).to_mkldnn()
    with torch.no_grad():
        y, z = ours(x), theirs(x).to_dense()
    assert y.layout == x.layout
    after = {None: lambda z: z, "relu": torch.relu, "gelu": nn.functional.gelu, "tanh": torch.tanh}
    expected = after[activation](z)
    torch.testing.assert_close(y.to_dense(), expected, rtol=1e-5, atol=1e-6)  # a rounding or two of float32


class Positive(nn.Module):
    def forward(self, weight):
        return weight.abs()


def model_with(cls, how):
    model = nn.Sequential(nn.Linear(4, 3), cls(3), nn.Linear(3, 3), cls(3))
    nn.init.uniform_(model[1].weight, -1, 1)
    if how == "spectral_norm":
        spectral_norm(model[1])
    else:
        parametrize.register_parametrization(model[1], "weight", Positive())
    return model


COPIES = {
    "deepcopy": lambda model, x: copy.deepcopy(model),
    "averaged": lambda model, x: AveragedModel(model),
    "folded": lambda model, x: bn.fold(model.eval(), x),
    "frozen": lambda model, x: copy.deepcopy(bn.freeze(model)),
}


@pytest.mark.parametrize("how", ["register", "spectral_norm"])
@pytest.mark.parametrize("cls", [nn.BatchNorm1d, bn.BatchNorm1d, bn.SyncBatchNorm])
@pytest.mark.parametrize("name", COPIES)
def test_a_parametrized_layer_is_copied(name, cls, how):
    model, x = model_with(cls, how), torch.randn(8, 4)
    model(x)
    copied = COPIES[name](model, x)
    torch.testing.assert_close(copied.eval()(x), model.eval()(x), rtol=1e-5, atol=1e-5)  # folding rounds otherwise
    if name == "deepcopy":
        layer, other = model[1], copied[1]
        assert type(other) is type(layer)
        assert getattr(other, "measured", None) is None
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.fill_(3.0)
        assert not torch.equal(other.weight, layer.weight), "a parameter of its own"


def test_options_and_what_is_mixed_in_are_copied_with_a_parametrized_layer():
    model = model_with(lambda n: bn.BatchNorm1d(n, activation="relu", nonfinite="skip"), "register")
    bn.freeze(model, affine=False)
    copied = copy.deepcopy(model[1])
    assert copied.frozen == ["stats"]
    assert (str(copied.activation), copied.nonfinite) == ("relu", "skip")
    assert not copied.train().training
