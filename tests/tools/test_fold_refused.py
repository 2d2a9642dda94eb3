"""fold(): what stays and what is said of it; forwards that cannot be traced; the check on example inputs."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune

import batchnorm as bn


class Net(nn.Module):
    """conv and norm, and a forward that is given."""

    def __init__(self, forward, **layers):
        super().__init__()
        self.conv, self.norm, self.other = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.steps = forward

    def forward(self, x):
        return self.steps(self, x)


class MyNorm(nn.BatchNorm2d):
    def forward(self, input):
        return super().forward(input) + 1


class MyConv(nn.Conv2d):
    def forward(self, input):
        return super().forward(input) + 1


def straight(net, x):
    return net.norm(net.conv(x))


def hooked(net):
    net.conv.register_forward_hook(lambda module, args, y: y + 1)
    return net


def pruned(net):
    prune.l1_unstructured(net.conv, "weight", amount=2)
    with torch.no_grad():
        net(torch.ones(1, 3, 3, 3))  # then the weight has no graph, and torch can copy the module
    return net


def tied(net):
    net.second = nn.Conv2d(3, 3, 1)
    net.second.weight = net.conv.weight
    return net


REFUSED = {
    "train mode": (lambda: Net(straight).train(), "train mode"),
    "no statistics": (lambda: Net(straight, norm=nn.BatchNorm2d(3, track_running_stats=False)), "no running stat"),
    "a function between": (lambda: Net(lambda n, x: n.norm(F.relu(n.conv(x)))), "input comes from function relu"),
    "a module between": (lambda: Net(lambda n, x: n.norm(n.act(n.conv(x))), act=nn.Tanh()), "input comes from act"),
    "a method between": (lambda: Net(lambda n, x: n.norm(n.conv(x).relu())), "input comes from method relu"),
    "nothing before": (lambda: Net(lambda n, x: n.norm(x)), "input comes from the input; and its output goes to the"),
    "used elsewhere": (lambda: Net(lambda n, x: (y := n.conv(x)) + n.norm(y)), "conv feeds function add too"),
    "returned too": (lambda: Net(lambda n, x: ((y := n.conv(x)), n.norm(y))), "conv feeds the output too"),
    "conv used twice": (lambda: Net(lambda n, x: n.norm(n.conv(x)) + n.conv(x)), "conv feeds function add too"),
    "conv of two norms": (lambda: Net(lambda n, x: n.norm(n.conv(x)) + n.other(n.conv(x))), "conv feeds other too"),
    "norm used twice": (lambda: Net(lambda n, x: n.norm(n.conv(x)) + n.norm(x)), "comes from conv and the input"),
    "conv fed by more": (lambda: Net(lambda n, x: n.conv(n.norm(x)) + n.conv(x)), "conv is fed by the input too"),
    "never called": (lambda: Net(lambda n, x: n.conv(x)), "the model does not call it"),
    "weight read": (lambda: Net(lambda n, x: straight(n, x) + n.conv.weight.sum()), "uses the tensors of Conv2d"),
    "statistics read": (lambda: Net(lambda n, x: straight(n, x) + n.norm.running_mean.sum()), "tensors of BatchNorm2d"),
    "tied weight": (lambda: tied(Net(straight)), "shares its weight"),
    "hook": (lambda: hooked(Net(straight)), "hook on Conv2d"),
    "pruned": (lambda: pruned(Net(straight)), "hook on Conv2d"),
    "weight_norm": (lambda: Net(straight, conv=parametrizations.weight_norm(nn.Conv2d(3, 3, 1))), "parametrized"),
    "their norm": (lambda: Net(straight, norm=MyNorm(3)), "MyNorm is an unknown class"),
    "their conv": (lambda: Net(straight, conv=MyConv(3, 3, 1)), "MyConv, is an unknown class"),
    "other axis": (lambda: Net(straight, norm=bn.BatchNorm2d(3, channel_dim=2)), "dimension 2"),
    "linear on the width": (lambda: Net(straight, conv=nn.Linear(3, 3)), "has 3 in dimension -1"),
    "activation before": (
        lambda: Net(lambda n, x: n.conv(n.norm(x)), norm=bn.BatchNorm2d(3, activation="relu")),
        "it runs an activation itself",
    ),
    "residual": (
        lambda: Net(lambda n, x: n.norm(n.conv(x), x), norm=bn.BatchNorm2d(3)),
        "other arguments than its input",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_exact_or_not_known_stays_with_the_reason(case):
    make, reason = REFUSED[case]
    net = make().double()
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d) and layer.running_mean is not None:
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
    if case != "train mode":
        net.eval()
    x = torch.randn(4, 3, 3, 3, dtype=torch.float64)
    folded = bn.fold(net, x)
    assert reason in folded.folding.refused["norm"]
    assert folded.folding.folded == {}
    assert folded.folding.error == 0.0
    assert f"norm: stays: {folded.folding.refused['norm']}" in str(folded.folding)
    assert bn.fold(net).folding.refused == folded.folding.refused


def test_the_axis_beside_a_linear_is_seen_on_example_inputs():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()
    model[1].running_mean.normal_()
    x = torch.randn(2, 4, 4)  # the norm's channels are in dimension 1, the linear's in dimension 2
    folded = bn.fold(model, x)
    assert "normalizes the 4 channels of dimension 1" in folded.folding.refused["1"]
    assert torch.equal(folded(x), model(x))
    last = nn.Sequential(nn.Linear(4, 4), bn.BatchNorm1d(4, channel_dim=-1), nn.Linear(4, 2)).eval()
    last[1].running_mean.normal_()
    for example in (None, x):
        folded = bn.fold(last, example)
        assert folded.folding.folded == {"1": "0"}
        torch.testing.assert_close(folded(x), last(x))


def test_what_a_forward_keeps_is_not_what_tracing_gave_it():
    def keeping(net, x):
        net.kept = net.conv(x) + torch.arange(3)
        return net.norm(net.conv(x))

    folded = bn.fold(Net(keeping).eval())
    assert "kept" not in vars(folded)
    assert set(vars(folded)) - set(vars(Net(keeping))) == {"folding"}


def test_the_layer_alone():
    assert "whole model" in bn.fold(nn.BatchNorm1d(3).eval()).folding.refused[""]


class Deciding(nn.Module):
    """A forward that looks at its input, with layers of its own, and layers in modules of its own."""

    def __init__(self, alias=False):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.pairs = nn.ModuleList([nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)])
        if alias:
            self.alias = self.stem[0]

    def forward(self, x):
        x = self.stem(x)
        if x.sum() > 0:
            x = self.norm(self.conv(x))
        for layer in self.pairs:
            x = layer(x)
        return x


def test_in_a_forward_that_cannot_be_traced_only_what_its_children_do_is_known():
    model = nn.Sequential(Deciding(), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)).eval()
    x = torch.randn(4, 3, 3, 3)
    folded = bn.fold(model, x).folding
    assert folded.folded == {"0.stem.1": "0.stem.0", "2": "1"}
    assert list(folded.refused) == ["0.norm", "0.pairs.1"]
    assert all("the forward of Deciding cannot be traced" in reason for reason in folded.refused.values())
    # Whether such a forward calls a layer beside the module that has it cannot be seen.
    assert "cannot be known" in bn.fold(Deciding(alias=True).eval()).folding.refused["stem.1"]


def test_arguments_by_name_tuples_and_outputs_in_containers():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.norm = nn.Linear(4, 3), nn.Linear(2, 3), nn.BatchNorm1d(3)

        def forward(self, x, y, extra=None, double=False):
            z = self.norm(self.a(x))
            if double:
                z = 2 * z
            if extra is not None:
                z = z + extra
            return {"z": [z, self.b(y)], "n": x.size(0)}

    model, x, y = Two().eval(), torch.randn(5, 4), torch.randn(5, 2)
    for inputs in ((x, y), {"y": y, "x": x}):
        folding = bn.fold(model, inputs).folding
        assert folding.folded == {"norm": "a"}
        # float32: 5 products of numbers below 4 a sum, one more rounding in each
        assert 0 <= folding.error <= 5 * 4 * 2**-23


class Deceiving(nn.Module):
    """What torch.fx traces is not what a tensor gets."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x):
        y = self.norm(self.conv(x))
        return y + self.conv(x) if isinstance(x, torch.Tensor) else y


class InFloat32(Deceiving):
    def forward(self, x):
        return super().forward(x.float())


@pytest.mark.parametrize(
    ("cls", "dtype"), [(Deceiving, torch.float32), (Deceiving, torch.bfloat16), (InFloat32, torch.float32)]
)
def test_a_wrong_fold_raises_on_example_inputs_and_the_model_is_as_it_was(cls, dtype):
    model = cls().eval().to(dtype)
    model.norm.running_var.fill_(4.0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"differs by .* on the example inputs"):
        bn.fold(model, torch.randn(8, 4, dtype=dtype))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_chance_and_buffers_that_move_do_not_make_a_difference():
    model = nn.Sequential(nn.Linear(4, 4), bn.freeze(nn.BatchNorm1d(4)), nn.Dropout(), nn.BatchNorm1d(4)).train()
    x, state = torch.randn(8, 4), torch.get_rng_state()
    folding = bn.fold(model, x).folding
    assert torch.equal(torch.get_rng_state(), state)
    assert model[3].num_batches_tracked == 0
    assert (folding.folded, list(folding.refused)) == ({"1": "0"}, ["3"])
