"""Sums of several batch norms, conditions that attributes rule out, timm's layers that have no activation."""

# ruff: noqa: RET504, B905, SIM108  (forwards as people write them)
import copy
import functools

import pytest
import torch
from fusible import same, step
from lookalikes import BatchNormAct2d
from torch import nn

import batchnorm as bn
from batchnorm.fuse import calls


def sequential(*after):
    return nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), *after)


class Three(nn.Module):
    """As EfficientLoFTR."""

    def __init__(self, identity=True):
        super().__init__()
        self.conv1, self.conv2, self.act = sequential(), sequential(), nn.ReLU()
        self.identity = nn.BatchNorm2d(4) if identity else None

    def forward(self, x):
        if self.identity is not None:
            identity_out = self.identity(x)
        else:
            identity_out = 0
        x = self.conv1(x) + self.conv2(x) + identity_out
        x = self.act(x)
        return x


class Rounds(nn.Module):
    """As RepGhost: each round adds a batch norm to the sum."""

    def __init__(self, rounds):
        super().__init__()
        self.primary, self.cheap, self.act = sequential(nn.ReLU(inplace=True)), sequential(), nn.ReLU()
        self.convs = nn.Sequential(*(nn.Conv2d(4, 4, 1) for _ in range(rounds)))
        self.bns = nn.Sequential(*(nn.BatchNorm2d(4) for _ in range(rounds)))

    def forward(self, x):
        x1 = self.primary(x)
        x2 = self.cheap(x1)
        for conv, norm in zip(self.convs, self.bns):
            x2 = x2 + norm(conv(x1))
        return self.act(x2)


class Flagged(nn.Module):
    """As the blocks of segmentation_models_pytorch."""

    def __init__(self, activates):
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.activates, self.shrinks = activates, False

    def forward(self, x):
        x = self.conv(x)
        x = self.bn(x)
        if self.activates:
            x = self.act(x)
        if self.shrinks:
            x = x / 2
        return x


class Between(Flagged):
    """The condition is between the batch norm and the activation."""

    def forward(self, x):
        x = self.bn(self.conv(x))
        if self.shrinks:
            x = x / 2
        return self.act(x)


class ConvNormAct(nn.Module):
    """As timm's."""

    def __init__(self, act):
        super().__init__()
        self.conv, self.bn, self.aa = nn.Conv2d(4, 4, 1), BatchNormAct2d(4, act), None

    def forward(self, x):
        x = self.conv(x)
        x = self.bn(x)
        aa = getattr(self, "aa", None)
        if aa is not None:
            x = self.aa(x)
        return x


class RegNet(nn.Module):
    """As timm's."""

    def __init__(self, shortcut):
        super().__init__()
        self.conv1, self.conv2 = ConvNormAct(nn.ReLU()), ConvNormAct(nn.Identity())
        self.drop_path, self.shortcut, self.act = nn.Identity(), shortcut, nn.ReLU()

    def forward(self, x):
        shortcut = x
        x = self.conv1(x)
        x = self.conv2(x)
        if self.shortcut is not None:
            x = self.drop_path(x) + self.shortcut(shortcut)
        x = self.act(x)
        return x


class OnlyInTheShortcut(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.shortcut, self.act = nn.Conv2d(4, 4, 1), sequential(), nn.ReLU()

    def forward(self, x):
        y = self.conv(x)
        if self.shortcut is not None:
            y = y + self.shortcut(x)
        return self.act(y)


class Decorated(nn.Module):
    """What is wrapped around forward leaves the methods that it calls."""

    def __init__(self):
        super().__init__()
        self.bn, self.act = nn.BatchNorm2d(4), nn.ReLU()

    @torch.autocast("cpu", enabled=False)
    def forward(self, x):
        return self.features(x) * 2

    def features(self, x):
        return self.act(self.bn(x))


CASES = {  # the model, and for each fused call whether it has a residual
    "three": (lambda: Three(), [True]),
    "two of three": (lambda: Three(identity=False), []),
    "one round": (lambda: Rounds(1), [False, True]),
    "two rounds": (lambda: Rounds(2), [False, True]),
    "no round": (lambda: nn.Sequential(Rounds(0), sequential()), [False]),
    "flag": (lambda: nn.Sequential(Flagged(False), nn.Sigmoid()), [False]),
    "flag that is set": (lambda: nn.Sequential(Flagged(True), nn.Sigmoid()), [False]),
    "flag between": (lambda: nn.Sequential(Between(True)), [False]),
    "timm's": (lambda: RegNet(ConvNormAct(nn.Identity())), [False, True]),
    "timm's, shortcut": (lambda: RegNet(nn.Identity()), [False, True]),
    "timm's, no shortcut": (lambda: RegNet(None), [False, False]),
    "timm's, in a sequential": (lambda: nn.Sequential(BatchNormAct2d(4, nn.Identity()), nn.ReLU()), [False]),
    "only in the shortcut": (lambda: OnlyInTheShortcut(), [True]),
    "decorated": (lambda: Decorated(), [False]),
}


@pytest.mark.filterwarnings("ignore:converted, but not fused everywhere")
@pytest.mark.parametrize("name", CASES)
def test_it_is_fused_and_computes_the_same(name, fused_calls):
    build, expected = CASES[name]
    model, x = build().double(), torch.randn(4, 4, 5, 5).double()
    twin, fused = copy.deepcopy(model), bn.convert(model, fuse=True)
    same(step(fused, x), step(twin, x))
    assert fused_calls == expected
    same([fused.eval()(x)], [twin.eval()(x)])


def flip(model):
    model[0].activates = True


def shrink(model):
    model[0].shrinks = True


def shrink_between(model):
    model[0].shrinks = True


def hook_on_the_identity(model):
    model.conv2.bn.act.register_forward_hook(lambda module, args, y: y + 1)


def drop(model):
    model.conv2.bn.drop = nn.Hardtanh(-0.5, 0.5)


def activate(model):
    model.conv2.bn.act = nn.Tanh()


def smooth(model):
    model.conv2.aa = nn.AvgPool2d(1)


def drop_the_path(model):
    model.drop_path = nn.Hardtanh(-0.5, 0.5)


LATER = {flip: "flag", shrink: "flag", shrink_between: "flag between"} | dict.fromkeys(
    (hook_on_the_identity, drop, activate, smooth, drop_the_path), "timm's"
)


@pytest.mark.parametrize("change", LATER, ids=lambda change: change.__name__)
def test_what_changes_later_is_obeyed(change):
    model, x = CASES[LATER[change]][0]().double(), torch.randn(4, 4, 5, 5).double()
    twin, fused = copy.deepcopy(model), bn.convert(model, fuse=True)
    before = twin(x)
    twin.load_state_dict(fused.state_dict())
    for each in (twin, fused):
        change(each)
    if change is not smooth:
        assert not torch.allclose(copy.deepcopy(twin)(x), before)  # else it would show nothing
    same(step(fused, x), step(twin, x))


@pytest.mark.parametrize("sync", [False, True])
def test_a_layer_of_several_ranks_does_not_wait_for_other_modules(sync):
    parent = nn.Module()
    parent.bn, parent.other = bn.BatchNorm2d(4, sync=sync), bn.BatchNorm2d(4)
    x = torch.randn(2, 4, 3, 3)
    assert type(calls.start(parent.bn, x)) is calls.Pending
    # The other one may be synchronized too: whichever waits, all ranks have to meet in the order of the source.
    waits = type(calls.start(parent.bn, x, parent, ("other",))) is calls.Pending
    assert waits is not sync


class GELUActivation(nn.Module):
    """transformers', whose `use_gelu_python` computes it by erf in steps."""

    def __init__(self, use_gelu_python=False):
        super().__init__()
        self.act = self._gelu_python if use_gelu_python else nn.functional.gelu

    def _gelu_python(self, x):
        return x * 0.5 * (1.0 + torch.erf(x / 2**0.5))

    def forward(self, x):
        return self.act(x)


GELUActivation.__module__ = "transformers.activations"


@pytest.mark.parametrize("by_steps", [False, True])
def test_gelu_of_transformers_is_fused_where_it_is_torchs(by_steps, fused_calls):
    model = bn.convert(nn.Sequential(nn.BatchNorm2d(4), GELUActivation(by_steps)), fuse=True)
    model(torch.randn(2, 4, 3, 3))
    assert len(fused_calls) == (not by_steps)


# What is named, and what is not.


class Ghost(nn.Module):
    """As GhostNetV2: a child's batch norm waits in vain."""

    def __init__(self):
        super().__init__()
        self.short, self.primary, self.gate = sequential(), nn.Conv2d(4, 4, 1), nn.Sigmoid()

    def forward(self, x):
        res = self.short(x)
        y = torch.cat([self.primary(x), x], 1)
        return y[:, :4] * self.gate(res)


class Xception(nn.Module):
    def __init__(self, inplace=False):
        super().__init__()
        self.rep, self.skip = nn.Sequential(nn.ReLU(inplace), *sequential()), sequential()

    def forward(self, x):
        y = self.rep(x)
        y += self.skip(x)
        return y


class Apart(nn.Module):
    """The blocks add up, and the next one activates."""

    def __init__(self):
        super().__init__()
        self.block1, self.block2 = Xception(), Xception()

    def forward(self, x):
        x = self.block1(x)
        x = self.block2(x)
        return x


class ByAMethod(Xception):
    """As timm's XceptionModule."""

    def forward(self, x):
        return self._residual(self.rep(x), x)

    def _residual(self, y, x):
        return y + x


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.block, self.act = Xception(), nn.ReLU()

    def forward(self, x):
        return self.act(self.block(x))


class Checkpointed(nn.Module):
    """As transformers' GradientCheckpointingLayer."""

    def __init_subclass__(cls):
        forward = cls.forward

        @functools.wraps(forward)
        def checkpointed(self, x):
            return forward(self, x)

        cls.forward = checkpointed


class Layer(Checkpointed):
    def __init__(self):
        super().__init__()
        self.bn, self.act = nn.BatchNorm2d(4), nn.ReLU()

    def forward(self, x):
        return self.act(self.bn(x))


class Healthy(Checkpointed):
    """Nothing to fuse."""

    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x):
        return self.bn(x) * 2


class Lists(nn.Module):
    """As HRNet."""

    def __init__(self):
        super().__init__()
        one, two = nn.ModuleList([sequential(), nn.Identity()]), nn.ModuleList([nn.Identity(), nn.Identity()])
        self.layers, self.act = nn.ModuleList([one, two]), nn.ReLU()

    def forward(self, x):
        found = []
        for layer in self.layers:
            y = None
            for f in layer:
                if y is None:
                    y = f(x)
                else:
                    y = y + f(x)
            found.append(self.act(y))
        return sum(found)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn, self.act = nn.BatchNorm2d(4), nn.ReLU()

    def forward(self, x):
        y = self.bn(x)
        y = y + x
        y = y + 1 * x
        return self.act(y)


class TwiceAtOnce(Twice):
    def forward(self, x):
        return self.act(self.bn(x) + x + x)


NAMED = {
    Ghost: r"line \d+, `y = torch.cat.*: this is between",
    Apart: r"line \d+, `x = self.block1\(x\)`: the batch norm is in one module, its activation within another",
    Outer: r"line \d+, `return self.act.*: the batch norm is in one module",
    Layer: r"__init_subclass__",
    Lists: r"line \d+, `y = f\(x\)`: the block ends before the activation",
    Twice: r"line \d+, `y = y \+ 1 \* x`: more than one thing is added",
    TwiceAtOnce: r"line \d+, `return self.act.*: more than one thing is added",
}


@pytest.mark.parametrize("build", NAMED, ids=lambda build: build.__name__)
def test_what_is_not_fused_is_named_once(build, fused_calls):
    model, x = build(), torch.randn(4, 4, 5, 5)
    twin = copy.deepcopy(model)
    with pytest.warns(UserWarning, match=f"not fused everywhere:\n  1 {build.__name__} .the model.: .*{NAMED[build]}"):
        bn.convert(model, fuse=True)
    assert len(bn.nn.explain_fusion(model)[""].left) == 1
    torch.testing.assert_close(model(x), twin(x))
    assert not fused_calls


@pytest.mark.parametrize("block", [Xception, ByAMethod])
def test_blocks_in_a_sequential_are_named_too(block):
    model = nn.Sequential(block(), nn.Identity(), block(), nn.Conv2d(4, 4, 1))
    with pytest.warns(UserWarning, match=r"1 \S+ .the model.: .*, 0 and 2: the batch norm is in one module"):
        bn.convert(model, fuse=True)


class Residual(nn.Module):
    """As MobileNetV2: a sum without an activation."""

    def __init__(self, *before):
        super().__init__()
        self.conv = nn.Sequential(*before, *sequential())

    def forward(self, x):
        return x + self.conv(x)


class Excited(nn.Module):
    """The squeeze-and-excitation comes between, in any case; or another of two branches."""

    def __init__(self):
        super().__init__()
        self.bn, self.se, self.act, self.use_conv = nn.BatchNorm2d(4), nn.Softmax(1), nn.ReLU(), True

    def forward(self, x):
        x = self.bn(x)
        if self.se is not None:
            x = self.se(x)
        x = self.act(x)
        x = self.bn(x)
        if self.use_conv:
            x = x * 2
        else:
            x = x * 3
        return self.act(x)


class Swish(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(x)


class Shortcut(nn.Module):
    """The shortcut's batch norm cannot wait, and need not: another one does."""

    def __init__(self):
        super().__init__()
        self.main, self.shortcut, self.act = sequential(), sequential(), nn.ReLU()

    def forward(self, x):
        y = self.shortcut(x)
        x = x * 2
        z = self.main(x)
        z += y
        return self.act(z)


HEALTHY = {
    "residuals": lambda: nn.Sequential(Residual(), Residual(), nn.Conv2d(4, 4, 1), nn.ReLU()),
    "excited": Excited,
    "an activation of another kind": lambda: nn.Sequential(*sequential(), Swish()),
    "shortcut": Shortcut,
    "checkpointed": Healthy,
}


@pytest.mark.parametrize("name", HEALTHY)
def test_what_is_healthy_is_not_warned_of(name, recwarn):
    bn.convert(HEALTHY[name](), fuse=True)
    assert [str(each.message) for each in recwarn] == []
