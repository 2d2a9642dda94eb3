"""freeze() and unfreeze(): nothing moves while frozen, whatever is done to the model, and everything is back after."""

import copy
import io
import pickle

import pytest
import torch
from lookalikes import FrozenBatchNorm2d
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize

import batchnorm as bn
from batchnorm.mixin import plain_class, set_class
from batchnorm.nn.frozen import Frozen

SHAPES = {1: (6, 3), 2: (4, 3, 5, 6), 3: (2, 3, 3, 4, 5)}
LAYERS = [
    *((cls, SHAPES[1]) for cls in (nn.BatchNorm1d, bn.BatchNorm1d, nn.SyncBatchNorm)),
    *((cls, SHAPES[2]) for cls in (nn.BatchNorm2d, bn.BatchNorm2d)),
    *((cls, SHAPES[3]) for cls in (nn.BatchNorm3d, bn.BatchNorm3d)),
]


class Mine(nn.BatchNorm2d):
    """A subclass that computes something else."""

    def forward(self, input):
        return super().forward(input) + 1


class Net(nn.Module):
    """A backbone and a head, with one layer in two places and the other in eval mode."""

    def __init__(self, cls=nn.BatchNorm1d):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(64, 20), cls(20), nn.ReLU(), nn.Linear(20, 20), cls(20).eval())
        self.head = nn.Sequential(cls(20), nn.Linear(20, 10))
        self.again = self.backbone[1]

    def forward(self, x):
        return self.head(self.again(self.backbone(x)))


def seen_some_data(layer, shape):
    """Running statistics, gamma and beta that are not the initial ones."""
    for _ in range(3):
        layer(torch.randn(shape) * 2 + 1)
    with torch.no_grad():
        for p in layer.parameters():
            p.uniform_(0.5, 1.5)
    return layer


def everything(model):
    """Whatever a freeze could leave behind."""
    return (
        [(n, id(m), type(m), m.training, sorted(m.__dict__)) for n, m in model.named_modules()],
        [(n, id(p), p.requires_grad) for n, p in model.named_parameters()],
        [(n, id(b), b.tolist()) for n, b in model.named_buffers()],
        repr(model),
        list(model.state_dict()),
        model.state_dict()._metadata,
    )


def train(model, steps=5):
    images, labels = load_digits(return_X_y=True)
    x, target = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for i in range(steps):
        loss = nn.functional.cross_entropy(model(x[i * 50 : i * 50 + 50]), target[i * 50 : i * 50 + 50])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize(("cls", "shape"), LAYERS)
def test_in_training_a_frozen_layer_is_the_layer_in_eval_mode_and_still_learns(cls, shape):
    layer = seen_some_data(cls(3), shape)
    expected = copy.deepcopy(layer).eval()
    assert bn.freeze(layer) is layer
    x = torch.randn(shape)
    for module in (layer.train(), expected):
        module(x).square().sum().backward()
    assert torch.equal(layer(x), expected(x))
    assert torch.equal(layer.weight.grad, expected.weight.grad)
    assert torch.equal(layer.bias.grad, expected.bias.grad)
    for a, b in zip(layer.buffers(), expected.buffers(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("cls", [nn.BatchNorm1d, bn.BatchNorm1d])
@pytest.mark.parametrize("chosen", [{}, {"affine": True}, {"stats": False, "affine": True}])
def test_training_moves_what_is_not_frozen_and_nothing_else(cls, chosen):
    model = bn.freeze(Net(cls), **chosen).train()
    before = copy.deepcopy(model.state_dict())
    train(model)
    stats, affine = chosen.get("stats", True), chosen.get("affine", False)
    for name, value in model.state_dict().items():
        layer = model.get_submodule(name.rpartition(".")[0])
        learned = isinstance(layer, nn.Linear)
        frozen = not learned and (affine if name.endswith(("weight", "bias")) else stats)
        assert torch.equal(value, before[name]) == frozen, name


@pytest.mark.parametrize("cls", [nn.BatchNorm1d, bn.BatchNorm1d])
@pytest.mark.parametrize("chosen", [{}, {"affine": True}, {"stats": False, "affine": True}])
def test_unfreezing_undoes_exactly(cls, chosen):
    model = Net(cls)
    model.head[0].weight.requires_grad_(False)  # not frozen by us, so it must not be thawed by us
    model.backbone[4].bias = model.head[0].bias  # tied: two layers freeze it
    before = everything(model)
    bn.freeze(bn.freeze(model, **chosen), **chosen)
    assert everything(model) != before
    assert bn.unfreeze(model) is model
    assert everything(model) == before
    assert everything(bn.unfreeze(model)) == before


def test_after_unfreezing_a_layer_is_in_the_mode_that_was_set_last():
    model = bn.freeze(Net()).train()
    assert not model.head[0].training
    assert bn.unfreeze(model).head[0].training
    assert model.backbone[4].training
    bn.unfreeze(bn.freeze(model).eval())
    assert not any(m.training for m in model.modules())


def test_nothing_sets_a_frozen_layer_to_training():
    layer = bn.freeze(nn.BatchNorm1d(3))
    for mode in (layer.train, layer.eval, lambda: setattr(layer, "training", True)):
        mode()
        assert layer.training is False


@pytest.mark.parametrize("cls", [nn.BatchNorm1d, bn.BatchNorm1d])
def test_update_bn_leaves_frozen_statistics_alone(cls):
    model = nn.Sequential(*(seen_some_data(cls(3), SHAPES[1]) for _ in range(3)))
    bn.freeze(model[0])
    bn.freeze(model[1], stats=False, affine=True)
    kept = copy.deepcopy(model[0].state_dict())
    x = torch.randn(64, 3) + 5
    torch.optim.swa_utils.update_bn([x], model)
    assert all(torch.equal(value, kept[name]) for name, value in model[0].state_dict().items())
    # Of one batch the cumulative average is the batch: it is the frozen layer's output, to a few ulp.
    torch.testing.assert_close(model[1].running_mean, model[0](x).mean(0), rtol=1e-5, atol=1e-6)
    assert [layer.num_batches_tracked.item() for layer in model] == [3, 1, 1]
    model[0].reset_parameters()  # says what it does, so it does
    assert model[0].running_mean.eq(0).all()
    assert not model.train()[0].training
    seen_some_data(bn.unfreeze(model[0]), SHAPES[1]).reset_running_stats()
    assert model[0].running_mean.eq(0).all()


def test_a_part_of_a_model_and_a_layer_itself():
    model = Net()
    bn.freeze(model.backbone)
    assert [isinstance(m, Frozen) for m in (model.backbone[1], model.again, model.head[0])] == [True, True, False]
    bn.freeze(model.head[0], stats=False, affine=True)
    assert "frozen=stats)" in repr(model.again)
    assert "frozen=affine)" in repr(model.head[0])
    bn.freeze(model)
    assert "frozen=stats+affine)" in repr(model.head[0])
    bn.unfreeze(model.head)
    assert "frozen" not in repr(model.head)
    assert "frozen=stats)" in repr(model.backbone)


def test_subclasses_keep_their_forward_and_other_normalizations_are_left_alone():
    mine = seen_some_data(Mine(3), SHAPES[2])
    others = [nn.InstanceNorm2d(3, affine=True, track_running_stats=True), nn.GroupNorm(1, 3), nn.LayerNorm(3)]
    model = nn.Sequential(mine, *others)
    bn.freeze(model, affine=True)
    x = torch.randn(SHAPES[2])
    assert torch.equal(mine(x), copy.deepcopy(bn.unfreeze(copy.deepcopy(mine))).eval()(x))
    assert isinstance(mine, Mine)
    assert not any(isinstance(m, Frozen) for m in others)
    assert all(p.requires_grad for m in others for p in m.parameters())
    assert all(m.training for m in others)


def test_a_lazy_layer_stays_frozen_when_it_sees_its_first_input():
    layer = bn.freeze(nn.LazyBatchNorm1d(), affine=True)
    x = torch.randn(8, 3) + 5
    torch.testing.assert_close(layer(x), x / (1 + layer.eps) ** 0.5)
    assert (plain_class(layer), layer.training) == (nn.BatchNorm1d, False)
    assert type(bn.unfreeze(layer)) is nn.BatchNorm1d
    assert layer.weight.requires_grad
    assert layer.training

    lazy = bn.unfreeze(bn.freeze(nn.LazyBatchNorm1d()))
    lazy(x)
    assert lazy.num_batches_tracked == 1


def test_what_cannot_be_frozen_raises_and_nothing_is_changed():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3, track_running_stats=False))
    before = everything(model)
    with pytest.raises(ValueError, match=r"cannot freeze the statistics of 1: .*track_running_stats=False"):
        bn.freeze(model)
    with pytest.raises(ValueError, match="nothing to freeze"):
        bn.freeze(model, stats=False)
    assert everything(model) == before
    bn.freeze(model, stats=False, affine=True)
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("cls", [nn.BatchNorm1d, bn.BatchNorm1d])
def test_copies_and_pickles_are_frozen_and_unfreeze(cls):
    model = bn.freeze(nn.Sequential(nn.Linear(4, 3), seen_some_data(cls(3), SHAPES[1])), affine=True)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    x = torch.randn(8, 4)
    for other in (
        copy.deepcopy(model),
        copy.copy(model),
        pickle.loads(pickle.dumps(model, protocol=0)),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
    ):
        assert type(other[1]) is type(model[1])
        assert repr(other) == repr(model)
        assert torch.equal(other.train()(x), model(x))
    bn.unfreeze(other)
    assert type(other[1]) is cls
    assert other[1].weight.requires_grad
    assert not model[1].weight.requires_grad


def through_a_file(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("theirs", [nn.BatchNorm1d, bn.BatchNorm1d])
@pytest.mark.parametrize("frozen_too", [False, True])
def test_the_state_loads_strictly_into_torchs_layers_and_back(theirs, frozen_too):
    """Frozen into unfrozen torch.nn, and torch.nn's into frozen: the values arrive, and nothing thaws."""
    model = bn.freeze(Net(theirs))
    state = through_a_file(model.state_dict())
    plain = Net()
    if frozen_too:
        bn.freeze(plain)
    plain.load_state_dict(state)
    assert list(state) == list(plain.state_dict())
    assert isinstance(plain.head[0], Frozen) == frozen_too
    for other in (plain.state_dict(), dict(plain.state_dict()), Net().state_dict()):
        model.load_state_dict(through_a_file(other))
        assert "frozen=stats)" in repr(model.head[0])
        assert all(torch.equal(v, other[k]) for k, v in model.state_dict().items())


def test_what_is_frozen_travels_with_the_state():
    model = bn.freeze(Net(bn.BatchNorm1d).backbone, affine=True)
    bn.freeze(bn.unfreeze(model[4]), stats=False, affine=True)
    resumed = Net(bn.BatchNorm1d).backbone
    resumed.load_state_dict(through_a_file(model.state_dict()))
    assert repr(resumed) == repr(model)
    assert [p.requires_grad for p in resumed.parameters()] == [p.requires_grad for p in model.parameters()]
    bn.unfreeze(resumed)
    assert all(p.requires_grad for p in resumed.parameters())


@pytest.mark.parametrize("nonsense", [5, "stats", ["gamma"], {"stats": 1}, None])
def test_metadata_of_somebody_elses_is_ignored(nonsense):
    state = bn.freeze(nn.BatchNorm1d(3)).state_dict()
    state._metadata[""]["frozen"] = nonsense
    layer, other = bn.freeze(nn.BatchNorm1d(3)), bn.BatchNorm1d(3)
    layer.load_state_dict(state)
    other.load_state_dict(state)
    assert layer.frozen == ["stats"]
    assert type(other) is bn.BatchNorm1d


@pytest.mark.slow
@pytest.mark.parametrize("cls", [nn.BatchNorm2d, bn.BatchNorm2d])
def test_a_frozen_layer_compiles_whole_and_recompiles_when_unfrozen(cls):
    layer = seen_some_data(cls(3), SHAPES[2])
    frozen = bn.freeze(copy.deepcopy(layer)).train()
    compiled = torch.compile(nn.Sequential(frozen), fullgraph=True, backend="aot_eager")
    x = torch.randn(SHAPES[2])
    expected = copy.deepcopy(layer)
    torch.testing.assert_close(compiled(x), expected.eval()(x))
    assert torch.equal(frozen.num_batches_tracked, expected.num_batches_tracked)
    bn.unfreeze(frozen)
    torch.testing.assert_close(compiled(x), expected.train()(x))
    torch.testing.assert_close(frozen.running_var, expected.running_var)
    assert torch.equal(frozen.num_batches_tracked, expected.num_batches_tracked)


@pytest.mark.parametrize("cls", [nn.BatchNorm2d, bn.BatchNorm2d])
def test_a_frozen_layer_can_be_traced_and_exported(cls):
    model = bn.freeze(nn.Sequential(seen_some_data(cls(3), SHAPES[2]))).train()
    x = torch.randn(SHAPES[2])
    expected = model(x)
    assert torch.equal(torch.fx.symbolic_trace(model)(x), expected)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected)
    state = torch.func.functional_call(model, dict(model.named_parameters()), (x,))
    assert torch.equal(state, expected)


@pytest.mark.usefixtures("group")
def test_distributed_data_parallel():
    model = DistributedDataParallel(bn.freeze(Net(bn.BatchNorm1d), affine=True))
    before = copy.deepcopy(model.module.state_dict())
    train(model.train())
    changed = [k for k, v in model.module.state_dict().items() if not torch.equal(v, before[k])]
    assert changed
    assert {type(model.module.get_submodule(k.rpartition(".")[0])) for k in changed} == {nn.Linear}
    assert "frozen" not in repr(bn.unfreeze(model))


def test_the_class_swaps_under_a_freeze():
    layer = bn.freeze(nn.BatchNorm2d(3))
    set_class(layer, bn.BatchNorm2d)
    assert (plain_class(layer), layer.training) == (bn.BatchNorm2d, False)
    assert isinstance(layer, bn.BatchNorm2d)
    assert type(bn.unfreeze(layer)) is bn.BatchNorm2d
    set_class(layer, nn.BatchNorm2d)
    assert type(layer) is nn.BatchNorm2d


@pytest.mark.parametrize("first", [bn.convert, bn.freeze])
def test_convert_and_revert_before_and_after(first):
    model = Net()
    bn.freeze(bn.convert(model)) if first is bn.convert else bn.convert(bn.freeze(model))
    layers = (model.again, model.head[0])
    assert all(isinstance(m, bn.BatchNorm1d) and not m.training for m in layers)
    bn.revert(model)
    assert all(plain_class(m) is nn.BatchNorm1d and not m.training for m in layers)
    assert all(type(m) is nn.BatchNorm1d for m in (bn.unfreeze(model).again, model.head[0]))


class Positive(nn.Module):
    """Gamma of one tensor, with a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, original):
        return original.abs() * self.scale

    def right_inverse(self, gamma):
        return gamma / self.scale.detach()


class Normed(nn.Module):
    """Gamma of two tensors, as torch.nn.utils.parametrizations.weight_norm has it."""

    def forward(self, size, direction):
        return size * direction

    def right_inverse(self, gamma):
        return gamma.norm(), gamma / gamma.norm()


ORDERS = ["freeze parametrize unfreeze remove", "freeze parametrize remove unfreeze"]
ORDERS += ["parametrize freeze unfreeze remove", "parametrize freeze remove unfreeze"]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("kind", [Positive, Normed])
@pytest.mark.parametrize("cls", [nn.BatchNorm2d, bn.BatchNorm2d, Mine])
def test_freezing_and_parametrizations_in_any_order(cls, kind, affine, order):
    layer = seen_some_data(cls(3), SHAPES[2])
    with torch.no_grad():
        layer.weight.uniform_(0.5, 2)
    x, gamma = torch.randn(4, 3, 2, 2), layer.weight.detach().clone()
    expected, kept = copy.deepcopy(layer).eval()(x), copy.deepcopy(layer.state_dict())
    steps = {
        "freeze": lambda: bn.freeze(layer, affine=affine),
        "unfreeze": lambda: bn.unfreeze(layer),
        "parametrize": lambda: parametrize.register_parametrization(layer, "weight", kind()),
        "remove": lambda: parametrize.remove_parametrizations(layer, "weight"),
    }
    frozen = False
    for step in order.split():
        steps[step]()
        frozen = frozen != (step in ("freeze", "unfreeze"))
        assert (layer.train().training, "frozen=" in repr(layer)) == (not frozen, frozen)
        if frozen:
            torch.testing.assert_close(layer(x), expected)
            torch.testing.assert_close(copy.deepcopy(layer)(x), expected)
            if step == "freeze" and affine:
                assert not any(p.requires_grad for p in layer.parameters())
    assert type(layer) is cls
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {"weight", "bias"}
    torch.testing.assert_close(layer.weight.detach(), gamma)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(getattr(layer, name), kept[name])


def test_what_is_no_parameter_any_more_is_said_in_the_summary():
    """Of several tensors that require no gradient torch makes a buffer, as in FrozenBatchNorm."""
    layer = bn.freeze(nn.BatchNorm2d(3), affine=True)
    assert "nothing; frozen: gamma, beta, statistics" in str(bn.summary(layer))
    parametrize.register_parametrization(layer, "weight", Normed())
    parametrize.remove_parametrizations(layer, "weight")
    assert "nothing; frozen: gamma (a buffer), beta, statistics" in str(bn.summary(layer))
    assert "gamma, beta  " in str(bn.summary(bn.unfreeze(layer)))


def test_a_copy_is_frozen_by_itself():
    """Copies of a parametrized layer share the class that torch made for it."""
    layer = nn.BatchNorm1d(3)
    parametrize.register_parametrization(layer, "weight", Positive())
    copied = copy.deepcopy(layer)
    bn.freeze(copied)
    assert (layer.training, copied.training) == (True, False)
    assert "frozen" not in repr(layer)


def test_a_model_without_batch_norm_is_left_alone_and_named():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    with pytest.warns(UserWarning, match="no batch norm to freeze; it has Linear, ReLU") as caught:
        assert bn.freeze(model) is model
    assert [each.filename for each in caught] == [__file__]


def test_lookalikes_are_frozen_already():
    model = nn.Sequential(nn.BatchNorm2d(3), FrozenBatchNorm2d(3))
    before = copy.deepcopy(model[1].state_dict())
    bn.freeze(model, affine=True)
    bn.unfreeze(model)
    assert type(model[1]) is FrozenBatchNorm2d
    assert all(torch.equal(value, before[name]) for name, value in model[1].state_dict().items())
