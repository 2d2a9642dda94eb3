"""Making a model's layers synchronized, and back: what torch's own conversion loses stays."""

from __future__ import annotations

import copy
import pickle
import re

import pytest
import ranks
import torch
import torch.distributed as dist
from public import import_timm
from torch import nn

import batchnorm as bn


class Doubled(nn.BatchNorm1d):
    """A subclass with a forward of its own around torch's."""

    def forward(self, input):
        return 2 * super().forward(input)


class Alone(nn.BatchNorm1d):
    """A subclass that computes by itself."""

    def forward(self, input):
        return nn.functional.batch_norm(input, None, None, training=True)


class Net(nn.Module):
    """A layer in two places, a hooked one, a subclass."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3, momentum=0.2)
        self.blocks = nn.Sequential(nn.Linear(3, 3), self.norm, Doubled(3), nn.BatchNorm1d(3))
        self.seen = []
        self.blocks[3].register_forward_hook(lambda *_: self.seen.append("hook"))

    def forward(self, x):
        return self.blocks(self.norm(x))


CONVERSIONS = {
    "ours": bn.SyncBatchNorm.convert_sync_batchnorm,
    "torch": nn.SyncBatchNorm.convert_sync_batchnorm,
}
# Each of these is kept by ours and lost by torch's.
KEPT = {
    "sharing": lambda net, before: net.norm is net.blocks[1] is before.norm,
    "identity": lambda net, before: net.blocks[3] is before.last,
    "hooks": lambda net, before: net(torch.randn(4, 3)) is not None and net.seen == ["hook"],
    "subclass": lambda net, before: isinstance(net.blocks[2], Doubled),
}


class Before:
    def __init__(self, net):
        self.norm, self.last = net.norm, net.blocks[3]


@pytest.mark.parametrize("kept", KEPT)
def test_keeps_what_torch_loses(kept):
    torch.manual_seed(0)
    for whose, convert in CONVERSIONS.items():
        net = Net()
        before = Before(net)
        assert KEPT[kept](convert(net), before) is (whose == "ours")


@pytest.mark.parametrize("whose", ["torch", "timm"])
@pytest.mark.parametrize(
    ("layer", "lost"),
    [
        (lambda: bn.BatchNorm2d(3, activation="relu"), "activation=relu"),
        (lambda: bn.convert(nn.BatchNorm2d(3), nonfinite="skip"), "nonfinite=skip"),
        (lambda: bn.freeze(nn.BatchNorm2d(3)), "frozen=stats"),
        (lambda: bn.freeze(bn.BatchNorm2d(3, channel_dim=-1), affine=True), "channel_dim=-1, frozen=stats+affine"),
    ],
    ids=["activation", "converted", "frozen", "both"],
)
def test_a_conversion_by_others_that_would_lose_something_raises(whose, layer, lost):
    convert = CONVERSIONS["torch"] if whose == "torch" else import_timm().layers.convert_sync_batchnorm
    net = nn.Sequential(nn.Conv2d(3, 3, 1), layer())
    before = state_of(net)
    with pytest.raises(RuntimeError, match=rf"without {re.escape(lost)}, .* Use bn\.convert\(model, sync=True\)"):
        convert(net)
    assert state_of(net) == before
    assert [name for name, _ in net[1].named_children()] == []  # to anybody else as ever


@pytest.mark.parametrize(
    "layer", [bn.BatchNorm2d, bn.SyncBatchNorm, lambda n: bn.unfreeze(bn.freeze(nn.BatchNorm2d(n)))]
)
def test_a_conversion_by_others_that_loses_nothing_goes_on(layer):
    net = nn.Sequential(layer(3))
    converted = CONVERSIONS["torch"](net)
    assert type(converted[0]) is nn.SyncBatchNorm


def test_a_subclass_computes_what_it_did():
    torch.manual_seed(0)
    x, net = torch.randn(6, 3), Net()
    expected = copy.deepcopy(net)(x)
    torch.testing.assert_close(bn.convert(net, sync=True)(x), expected)
    assert torch.equal(copy.deepcopy(net)(x), net(x))
    assert type(pickle.loads(pickle.dumps(net.blocks[2]))) is type(net.blocks[2])


def state_of(net):
    return [(type(m), {k: v for k, v in m.__dict__.items() if k != "_modules"}) for m in net.modules()]


def test_revert_undoes_it_exactly():
    net = Net()
    net.torchs = nn.SyncBatchNorm(2, process_group="a group")
    net.built = bn.BatchNorm1d(2)
    bn.revert(net.built)
    before = state_of(net)
    for options in ({}, {"sync": True}, {"sync": True}):
        bn.convert(net, **options)
    kinds = [type(m) for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert kinds[0] is bn.BatchNorm1d
    assert bn.SyncBatchNorm in kinds
    assert all(m.sync for m in net.modules() if hasattr(m, "sync"))
    net(torch.randn(4, 3))
    for revertible in (net, copy.deepcopy(net)):
        kinds = [type(m) for m in bn.revert(revertible).modules()]
        assert kinds == [kind for kind, _ in before]
        assert [m.__dict__.keys() - {"_modules"} for m in revertible.modules()] == [set(s) for _, s in before]
    assert [m.__dict__.get("process_group") for m in net.modules()] == [s.get("process_group") for _, s in before]


def test_revert_leaves_a_layer_built_synchronized_and_subclassed():
    class Mine(bn.BatchNorm1d):
        pass

    built, plain = Mine(2, sync=True), Mine(2)
    model = bn.convert(nn.Sequential(built, plain), sync=True)
    assert plain.sync
    bn.revert(model)
    assert (built.sync, plain.sync) == (True, False)


def test_names_are_known_to_messages():
    net = bn.convert(Net())
    with pytest.raises(ValueError, match=r"^norm: Expected more than 1 value per channel"):
        net(torch.randn(1, 3))


def test_what_cannot_be_synchronized_is_told():
    with pytest.warns(UserWarning, match=r"1 Alone \(0\): overrides forward without calling super\(\)\.forward"):
        model = bn.convert(nn.Sequential(Alone(2)), sync=True)
    assert type(model[0]) is Alone
    with pytest.warns(UserWarning, match="1 LazyBatchNorm1d .*: lazy: it has not seen an input yet"):
        bn.convert(nn.LazyBatchNorm1d(), sync=True)
    model = nn.Sequential(nn.BatchNorm1d(2), bn.BatchNorm1d(2, virtual_batch_size=4))
    with pytest.raises(ValueError, match=r"cannot convert 1: virtual_batch_size excludes sync"):
        bn.convert(model, sync=True)
    assert type(model[0]) is nn.BatchNorm1d


def test_frozen_layers_stay_frozen():
    model = bn.freeze(bn.convert(nn.Sequential(nn.BatchNorm1d(2)), sync=True))
    bn.unfreeze(bn.revert(model))
    assert type(model[0]) is nn.BatchNorm1d
    model = bn.convert(bn.freeze(model), sync=True)
    assert isinstance(model[0], bn.BatchNorm1d)
    assert not model.train()[0].training


def in_groups(rank):
    """Two groups of two; the layers of both, and a copy's, measure over their own."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    net = bn.convert(nn.Sequential(Doubled(1, affine=False)), sync=True, process_group=groups[rank // 2])
    torch.manual_seed(rank)
    x = torch.randn(3 + rank, 1)
    y, copied = net(x), copy.deepcopy(net)(x)
    bn.convert(net, sync=True)  # over all
    return x, y, copied, net(x), repr(net)


@pytest.mark.processes
def test_process_groups():
    found = ranks.run(in_groups, 4)
    for over, index in (((0, 1), 1), ((2, 3), 1), ((0, 1), 2), ((2, 3), 2), ((0, 1, 2, 3), 3)):
        x = torch.cat([found[rank][0] for rank in over]).double()
        exact = 2 * (x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt()
        ours = torch.cat([found[rank][index] for rank in over])
        torch.testing.assert_close(ours.double(), exact, rtol=0, atol=1e-6)
    assert "sync=True" in found[0][4]
