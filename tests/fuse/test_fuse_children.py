"""Batch norms whose activation or addition is elsewhere: in the parent, under a condition, in a loop; other classes."""

# ruff: noqa: RET504, B905, SIM108  (forwards as people write them)
import copy
import inspect
import pickle

import pytest
import torch
import torch.nn.functional as F
from fusible import same, step
from torch import nn
from torch.nn.functional import relu

import batchnorm as bn


class ConvNorm(nn.Module):
    """Ends in a batch norm, as timm's and transformers' do."""

    def __init__(self, act=None):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.act = nn.Identity() if act is None else act

    def forward(self, x):
        """Convolution, batch norm, and what comes after it."""
        x = self.conv(x)
        x = self.bn(x)
        x = self.act(x)
        return x


class Short(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.bn(self.conv(x))


class Named(nn.Sequential):
    """A Sequential of another class."""


class Activated(nn.Module):
    def __init__(self, child):
        super().__init__()
        self.child, self.act = child, nn.ReLU()

    def forward(self, x):
        return self.act(self.child(x))


class Block(nn.Module):
    """The shortcut runs between the last batch norm and the addition."""

    def __init__(self, child, shortcut):
        super().__init__()
        self.child, self.shortcut, self.act = child, shortcut, nn.ReLU()

    def forward(self, x):
        residual = x
        x = self.child(x)
        residual = self.shortcut(residual)
        x += residual
        x = self.act(x)
        return x


class Functional(nn.Module):
    def __init__(self, child):
        super().__init__()
        self.child = child

    def forward(self, x):
        features = self.child(x)
        out = F.relu(features, inplace=True)
        return out.mean((2, 3))


class Imported(nn.Module):
    """Functions by their bare names: an activation, and one that is nothing to us."""

    def __init__(self):
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x):
        x = relu(self.bn1(x))
        x = doubled(self.bn2(x))
        return relu(x)


def doubled(x):
    return 2 * x


class Conditions(nn.Module):
    """As DLA adds, and MobileNet of transformers normalizes and activates."""

    def __init__(self, adds=True, normalizes=True, activates=True):
        super().__init__()
        self.bn = nn.BatchNorm2d(4) if normalizes else None
        self.adds, self.act = adds, nn.ReLU6() if activates else None

    def forward(self, x):
        y = x * 2
        if self.bn is not None:
            y = self.bn(y)
        if self.adds:
            y += x
        if self.act is not None:
            y = self.act(y)
        return y


class Either(nn.Module):
    """As RegNet of torchvision."""

    def __init__(self, project):
        super().__init__()
        self.proj = sequential() if project else None
        self.f_x, self.act = Named(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)), nn.ReLU()

    def forward(self, x):
        if self.proj is not None:
            x = self.proj(x) + self.f_x(x)
        else:
            x = x + self.f_x(x)
        return self.act(x)


class Loop(nn.Module):
    """As Res2Net."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(3))
        self.bns = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(3))
        self.act = nn.ReLU()

    def forward(self, x):
        for i, (conv, norm) in enumerate(zip(self.convs, self.bns)):
            x = conv(x) * (i + 1)
            x = norm(x)
            x = self.act(x)
        return x


class SiLUActivation(nn.Module):
    def forward(self, x):
        return F.silu(x)


SiLUActivation.__module__ = "transformers.activations"


def sequential(*after):
    return nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), *after)


CASES = {  # the model, and how many of its batch norms run with an activation, and with an addition
    "child": (lambda: Activated(Short()), 1, 0),
    "child, identity": (lambda: Activated(ConvNorm()), 1, 0),
    "child of a child": (lambda: Activated(nn.Sequential(ConvNorm(nn.ReLU()), Short())), 2, 0),
    "sequential": (lambda: Activated(sequential()), 1, 0),
    "sequential, identity": (lambda: Activated(sequential(nn.Identity())), 1, 0),
    "sequential of another class": (lambda: Activated(Named(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))), 1, 0),
    "inside a sequential": (lambda: nn.Sequential(Short(), nn.ReLU()), 1, 0),
    "block": (lambda: Block(sequential(), nn.Identity()), 1, 1),
    "block, shortcut": (lambda: Block(sequential(), sequential()), 1, 1),
    "block, shortcut of its own": (lambda: Block(nn.Sequential(ConvNorm(nn.ReLU()), ConvNorm()), Short()), 2, 1),
    "function": (lambda: Functional(sequential()), 1, 0),
    "function by its bare name": (lambda: Imported(), 1, 0),
    "conditions": (lambda: Conditions(), 1, 1),
    "no addition": (lambda: Conditions(adds=False), 1, 0),
    "no activation": (lambda: Conditions(activates=False), 0, 0),
    "no batch norm": (lambda: nn.Sequential(Conditions(normalizes=False), nn.BatchNorm2d(4)), 0, 0),
    "either": (lambda: Either(True), 1, 1),
    "or": (lambda: Either(False), 1, 1),
    "loop": (lambda: Loop(), 3, 0),
    "hardtanh": (lambda: sequential(nn.Hardtanh(0, 6)), 1, 0),
    "hardtanh of other bounds": (lambda: sequential(nn.Hardtanh()), 0, 0),
    "mish": (lambda: sequential(nn.Mish()), 0, 0),
    "another library's": (lambda: Activated(Short()), 1, 0),
}


def built(name):
    model = CASES[name][0]().double()
    if name == "another library's":
        model.act = SiLUActivation()
    return model


@pytest.mark.parametrize("name", CASES)
def test_it_is_fused_and_computes_the_same(name, fused_calls):
    model, x = built(name), torch.randn(4, 4, 5, 5).double()
    twin, fused = copy.deepcopy(model), bn.convert(model, fuse=True)
    same(step(fused, x), step(twin, x))
    assert (len(fused_calls), sum(fused_calls)) == CASES[name][1:]
    same([fused.eval()(x)], [twin.eval()(x)])


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["child, identity", "block, shortcut of its own", "sequential of another class", "loop"]
)
def test_copies_pickles_and_compiled_ones_are_the_same(name):
    x = torch.randn(4, 4, 5, 5).double()
    model = bn.convert(built(name), fuse=True).eval()
    expected = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), expected)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected, rtol=1e-12, atol=1e-12)
    assert [type(m).__qualname__ for m in bn.revert(model).modules()] == [
        type(m).__qualname__ for m in built(name).modules()
    ]


@pytest.mark.parametrize("where", ["child", "child.bn", "child.act"])
def test_a_hook_within_the_child_sees_what_it_would_have(where):
    x = torch.randn(4, 4, 5, 5).double()
    twin = Activated(ConvNorm()).double()
    fused = bn.convert(copy.deepcopy(twin), fuse=True)
    seen = []
    for model in (twin, fused):
        model.get_submodule(where).register_forward_hook(lambda module, args, y: seen.append(y.detach().clone()))
        model(x)
    assert len(seen) == 2
    torch.testing.assert_close(seen[0], seen[1], rtol=1e-12, atol=1e-12)


def test_a_forward_that_is_replaced_later_is_obeyed(monkeypatch):
    model, x = bn.convert(Activated(Short()), fuse=True), torch.randn(4, 4, 5, 5)
    monkeypatch.setattr(Short, "forward", lambda self, x: x - 7)
    assert torch.equal(model(x), torch.relu(x - 7))


def test_an_activation_that_is_taken_away_later_leaves_a_tensor():
    model, x = bn.convert(Conditions(), fuse=True), torch.randn(4, 4, 5, 5)
    model.act = None
    twin = copy.deepcopy(model).eval()
    y = twin(x)
    assert type(y) is torch.Tensor
    torch.testing.assert_close(y, F.batch_norm(x * 2, twin.bn.running_mean, twin.bn.running_var) + x)


def test_what_is_in_the_way_is_named():
    class Observed(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.add_relu = nn.BatchNorm2d(4), torch.ao.nn.quantized.FloatFunctional()

        def forward(self, x):
            out = self.bn(x)
            out = self.add_relu.add_relu(out, x)
            return out

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.shortcut, self.act = nn.Softmax(1), sequential(), nn.ReLU()

        def forward(self, x):
            shortcut = self.shortcut(x)
            out = self.scale(x) + shortcut
            out = self.act(out)
            return out

    for build, why in (
        (Observed, "add_relu may observe the sum"),
        (Scaled, "the other summand is computed after the batch norm"),
    ):
        with pytest.warns(UserWarning, match=why):
            bn.convert(build(), fuse=True)


def test_many_modules_of_one_class_are_one_line_with_file_and_line():
    class Kept(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.act = nn.BatchNorm2d(4), nn.ReLU()

        def forward(self, x):
            y = self.bn(x)
            self.last = y
            return self.act(y)

    with pytest.warns(UserWarning, match="not fused everywhere") as said:
        bn.convert(nn.Sequential(*(Kept() for _ in range(30))), fuse=True)
    lines = str(said[0].message).splitlines()
    line = inspect.getsourcelines(Kept)[1] + 7
    assert len(lines) == 2
    assert lines[1].startswith(f"  30 Kept (0 and 29 more): test_fuse_children.py, line {line}, `self.last = y`:")


def test_a_graph_that_torch_fx_wrote_is_named():
    graph = torch.fx.symbolic_trace(Activated(Short()))
    with pytest.warns(UserWarning, match="torch.fx generated its forward"):
        bn.convert(graph, fuse=True)


def test_children_that_are_not_called_by_name_are_named():
    class Over(nn.ModuleDict):
        def forward(self, x):
            for module in self.values():
                x = module(x)
            return x

    with pytest.warns(UserWarning, match="its forward does not call bn and act by name"):
        bn.convert(Over({"bn": nn.BatchNorm2d(4), "act": nn.ReLU()}), fuse=True)


def test_a_function_by_its_bare_name_is_no_batch_norm():
    model = bn.convert(Imported(), fuse=True)
    assert bn.nn.explain_fusion(model)[""].fused == ("bn1 + relu",)
