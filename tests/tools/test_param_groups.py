"""param_groups(): which parameters decay, that none is lost or doubled, and that training does what the groups say."""

import pytest
import torch
from public import import_timm
from torch import nn

import batchnorm as bn


class Scale(nn.Module):
    """A module of one's own, with parameters in a child too."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return self.inner(x) * self.scale


class Net(nn.Module):
    """Every kind of parameter: bare, listed, shared, frozen, in recurrent and attention layers, in normalizations."""

    def __init__(self):
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(()))
        self.unbiased = nn.Parameter(torch.ones(4))
        self.queries = nn.ParameterList([nn.Parameter(torch.ones(4))])
        self.embedding = nn.Embedding(5, 4)
        self.linear = nn.Linear(4, 4)
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.linear.weight
        self.lstm = nn.LSTM(4, 4)
        self.attention = nn.MultiheadAttention(4, 2, add_bias_kv=True)
        norms = (nn.BatchNorm1d(4), bn.BatchNorm1d(4), nn.SyncBatchNorm(4), bn.freeze(nn.BatchNorm1d(4), affine=True))
        others = (nn.LayerNorm(4), nn.GroupNorm(2, 4), nn.RMSNorm(4), nn.InstanceNorm1d(4, affine=True))
        self.norms = nn.ModuleList([*norms, *others])
        self.gain = nn.Linear(4, 1, bias=False)
        self.gain.weight = self.norms[0].weight  # shared by a normalization: spared wherever it is met first
        self.scale = Scale()


DECAYS = [
    *("embedding.weight", "linear.weight", "lstm.weight_ih_l0", "lstm.weight_hh_l0"),
    *("attention.in_proj_weight", "attention.out_proj.weight", "scale.inner.weight"),
]


@pytest.mark.parametrize(
    ("spared", "also"),
    [
        ((), []),
        ((Scale,), ["scale.inner.weight"]),
        ((nn.Embedding, nn.LSTM), ["embedding.weight", "lstm.weight_ih_l0", "lstm.weight_hh_l0"]),
    ],
)
def test_weights_decay_and_gamma_beta_and_biases_do_not(spared, also):
    model = Net()
    decay, no_decay = bn.param_groups(model, 0.1, spared=spared)
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert {names[p] for p in decay["params"]} == set(DECAYS) - set(also)
    assert (decay["weight_decay"], no_decay["weight_decay"]) == (0.1, 0.0)


@pytest.mark.parametrize("name", ["resnet10t", "convnext_atto", "cait_xxs24_224", "xcit_nano_12_p16_224"])
def test_of_public_models_the_same_decays_as_with_timm(name):
    """LayerScale's gamma, lambda_1, temperatures and the like are of one dimension; xcit's temperature has three."""
    model = import_timm().create_model(name)
    from timm.optim import param_groups_weight_decay

    theirs = param_groups_weight_decay(model, 0.1)
    decaying = {id(p) for group in theirs if group["weight_decay"] for p in group["params"]}
    assert {id(p) for p in bn.param_groups(model, 0.1)[0]["params"]} == decaying


class FullyShardedDataParallel(nn.Module):
    """What FSDP1 shows of a model: parameters of any shape flattened to one dimension."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.linear = nn.Linear(4, 4)
        self.linear.weight = nn.Parameter(self.linear.weight.detach().flatten())


def test_a_dimension_says_nothing_of_what_was_flattened_or_is_not_known_yet():
    flat = nn.Sequential(FullyShardedDataParallel())
    assert bn.param_groups(flat, 0.1)[0]["params"] == [flat[0].linear.weight]
    lazy = nn.LazyLinear(3)
    assert bn.param_groups(lazy, 0.1)[0]["params"] == [lazy.weight]


def test_nothing_is_lost_or_doubled_and_the_order_is_that_of_the_model():
    model = Net()
    groups = bn.param_groups(model, 0.1)
    for group in groups:
        members = set(group["params"])
        assert [id(p) for p in group["params"]] == [id(p) for p in model.parameters() if p in members]
    every = [id(p) for group in groups for p in group["params"]]
    assert sorted(every) == sorted(id(p) for p in model.parameters())
    assert len(every) == len(set(every))


def test_a_model_of_one_kind_has_an_empty_group():
    layer = nn.BatchNorm1d(3)
    assert [len(group["params"]) for group in bn.param_groups(layer, 0.1)] == [0, 2]
    torch.optim.SGD(bn.param_groups(layer, 0.1), lr=0.1).step()
    assert [len(group["params"]) for group in bn.param_groups(nn.Embedding(2, 2), 0.1)] == [1, 0]


@pytest.mark.parametrize("wrong", [-1.0, float("nan")])
def test_a_weight_decay_that_is_none_raises(wrong):
    with pytest.raises(ValueError, match="Invalid weight_decay value"):
        bn.param_groups(nn.Linear(2, 2), wrong)


def test_parameters_in_place_of_the_model_raise():
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, not its parameters"):
        bn.param_groups(nn.Linear(2, 2).parameters(), 0.1)


# LBFGS takes no groups at all, Muon matrices only, SparseAdam sparse gradients only.
OPTIMIZERS = ["Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "SGD"]


@pytest.mark.parametrize("name", [*OPTIMIZERS, "Rprop"])
def test_every_optimizer_takes_them_and_steps(name):
    model = nn.Sequential(bn.BatchNorm1d(4), nn.Linear(4, 3))
    optimizer = getattr(torch.optim, name)(bn.param_groups(model, 0.1), lr=0.01)
    before = [p.detach().clone() for p in model.parameters()]
    (model(torch.randn(8, 4)) * torch.randn(8, 3)).sum().backward()
    optimizer.step()
    changed = [not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)]
    assert changed == [True, True, True, True]


# ASGD has a decay of its own, lambd, for all parameters.
@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "ASGD"])
def test_with_no_gradient_but_zero_only_what_decays_moves(name):
    model = nn.Sequential(nn.Linear(4, 3), bn.BatchNorm1d(3), nn.Linear(3, 2))
    optimizer = getattr(torch.optim, name)(bn.param_groups(model, 0.1), lr=0.01)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {"0.weight", "2.weight"}


def test_a_layer_unfrozen_later_is_trained_by_the_same_optimizer():
    model = bn.freeze(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), affine=True)
    optimizer = torch.optim.SGD(bn.param_groups(model, 0.1), lr=0.1)
    for frozen in (True, False):
        if not frozen:
            bn.unfreeze(model)
        before = model[1].weight.detach().clone()
        (model(torch.randn(8, 4)) * torch.randn(8, 3)).sum().backward()
        optimizer.step()
        assert torch.equal(model[1].weight, before) == frozen
