"""convert() and revert(): only the class of each layer changes, and what must not be touched is not."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

import batchnorm as bn
from batchnorm.nn.layer import skipped_by


class Net(nn.Module):
    """Batch-norm layers of every rank, nested, one of them in two places, one tied to another's weight."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.shared = nn.BatchNorm2d(4)
        self.blocks = nn.ModuleDict({"again": self.shared, "tied": nn.BatchNorm2d(4)})
        self.blocks["tied"].weight = self.shared.weight
        self.flat = nn.Sequential(nn.Flatten(), nn.Linear(64, 3), nn.BatchNorm1d(3, affine=False).eval())
        self.volume = nn.BatchNorm3d(1, track_running_stats=False)

    def forward(self, x):
        x = self.shared(self.conv(x))
        x = self.blocks["tied"](self.blocks["again"](x))
        x = self.volume(x[:, None])[:, 0]
        return self.flat(x)


def identities(model):
    """Everything by which the outside may hold on to a model."""
    return (
        [(n, id(m)) for n, m in model.named_modules(remove_duplicate=False)],
        [(n, id(p)) for n, p in model.named_parameters(remove_duplicate=False)],
        [(n, id(b)) for n, b in model.named_buffers(remove_duplicate=False)],
        [m.training for m in model.modules()],
        list(model.state_dict()),
    )


def test_everything_but_the_class_stays_the_same_object():
    model = Net()
    seen = []
    model.shared.register_forward_hook(lambda *_: seen.append("forward"))
    model.shared.weight.register_hook(lambda g: seen.append("gradient"))
    before = identities(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    assert bn.convert(model) is model
    assert identities(model) == before
    kinds = {type(m) for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    assert kinds == {bn.BatchNorm1d, bn.BatchNorm2d, bn.BatchNorm3d}

    old = model.shared.weight.detach().clone()
    model(torch.randn(3, 2, 6, 6)).square().sum().backward()
    optimizer.step()
    assert seen == ["forward", "forward", "gradient"]
    assert not torch.equal(model.shared.weight, old)

    assert bn.revert(model) is model
    assert identities(model) == before
    assert {type(m).__module__ for m in model.modules() if "BatchNorm" in type(m).__name__} == {
        "torch.nn.modules.batchnorm"
    }
    assert model.shared.__dict__.keys() == nn.BatchNorm2d(4).__dict__.keys()


def test_a_converted_model_computes_what_the_original_did():
    model = Net()
    x = torch.randn(3, 2, 6, 6)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    expected = model(x)
    model.load_state_dict(state)
    torch.testing.assert_close(bn.convert(model)(x), expected, rtol=1e-5, atol=1e-5)
    model.load_state_dict(state)
    assert torch.equal(bn.revert(model)(x), expected)


def test_a_layer_itself_converts():
    layer = nn.BatchNorm1d(3)
    assert bn.convert(layer) is layer
    assert type(layer) is bn.BatchNorm1d
    assert type(bn.revert(layer)) is nn.BatchNorm1d


class CallsSuper(nn.BatchNorm2d):
    """A subclass as people write them, with attributes of its own under names that our options have."""

    def __init__(self, channels):
        super().__init__(channels)
        self.activation = nn.ReLU()
        self.gamma = nn.Parameter(torch.tensor(2.0))
        self.beta, self.renorm, self.sync, self.channel_dim, self.skipped = 3.0, "no", "no", 7, -1
        self.virtual_batch_size = self.nonfinite = self.singleton = self.unbiased = self.initializers = "mine"

    def forward(self, x):
        return self.activation(super().forward(x)) * self.gamma + self.beta

    def measured(self):
        return "mine"


class Overrides(nn.BatchNorm2d):
    def forward(self, x):
        return F.batch_norm(x, None, None, self.weight, self.bias, True)


class Positive(nn.Module):
    def forward(self, weight):
        return weight.abs()


def parametrized():
    layer = nn.BatchNorm2d(3)
    parametrize.register_parametrization(layer, "weight", Positive())
    return layer


@pytest.mark.parametrize("options", [{}, {"sync": True}, {"nonfinite": "skip"}], ids=str)
def test_a_subclass_computes_what_it_did_and_keeps_its_attributes(options):
    layer, x = CallsSuper(3), torch.randn(4, 3, 5, 5) * 3 + 1
    own = {name: value for name, value in vars(layer).items() if not name.startswith("_")}
    twin, converted = copy.deepcopy(layer), bn.convert(layer, **options)
    assert converted is layer
    assert isinstance(layer, CallsSuper)
    for _ in range(2):
        # both round in float32; a value of up to 9 is off by a few ulp of 1e-6
        torch.testing.assert_close(layer(x), twin(x), rtol=1e-5, atol=1e-5)
    assert {name: vars(layer)[name] for name in own} == own
    assert layer.measured() == "mine"
    assert layer.state_dict().keys() == twin.state_dict().keys()
    for buffer, expected in zip(layer.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(buffer, expected)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(other) is type(layer)
        assert torch.equal(other.eval()(x), layer.eval()(x))
    bn.revert(layer.train())
    assert type(layer) is CallsSuper
    assert vars(layer).keys() == vars(twin).keys()


def test_the_running_statistics_of_a_subclass_skip_what_is_not_finite():
    layer = bn.convert(CallsSuper(3), nonfinite="skip")
    layer(torch.full((4, 3, 5, 5), math.nan))
    assert layer.running_mean.tolist() == [0.0, 0.0, 0.0]
    assert skipped_by(layer) == 1
    assert layer.skipped == -1  # the layer's own


def test_a_subclass_without_names_of_ours_shows_what_it_measured():
    class Plain(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x) + 1

    layer, x = bn.convert(Plain(3)), torch.randn(4, 3, 5, 5)
    layer(x)
    torch.testing.assert_close(layer.measured.mean, x.double().mean((0, 2, 3)))
    assert layer.skipped == 0


def left():
    own_forward, lazy = nn.BatchNorm2d(3), nn.LazyBatchNorm2d()
    own_forward.forward = lambda x: x
    return {
        "Overrides .*: overrides forward without calling super": Overrides(3),
        "LazyBatchNorm2d .*: lazy": lazy,
        "BatchNorm2d .*: parametrized": parametrized(),
        "BatchNorm2d .*: its forward was replaced": own_forward,
    }


@pytest.mark.parametrize("why", list(left()))
@pytest.mark.parametrize("options", [{}, {"fuse": True}, {"sync": True}, {"nonfinite": "skip"}], ids=str)
def test_what_is_not_converted_is_left_as_it_was_and_named(why, options):
    layer = left()[why]
    model = nn.Sequential(nn.BatchNorm2d(3), layer)
    kind, attributes = type(layer), vars(layer).keys()
    with pytest.warns(UserWarning, match=rf"(?s)converted 1 of 2 batch norms.*1 {why}") as said:
        assert bn.convert(model, **options) is model
    assert len(said) == 1
    shown = [f"{name}={value!r}" for name, value in options.items() if name != "fuse"]
    assert all(option in str(said[0].message) for option in shown)
    assert type(layer) is kind
    assert vars(layer).keys() == attributes
    assert type(model[0]) is bn.BatchNorm2d


def test_many_layers_of_one_class_are_one_line():
    model = nn.Sequential(*(Overrides(3) for _ in range(40)))
    with pytest.warns(UserWarning, match="converted") as said:
        bn.convert(model)
    assert str(said[0].message).splitlines() == [
        "converted 0 of 40 batch norms; these stay as they are:",
        "  40 Overrides (0 and 39 more): overrides forward without calling super().forward",
    ]


def test_a_model_without_batch_norm_is_told_of_what_it_is_made():
    with pytest.warns(UserWarning, match="the model has no batch norm; it has Linear, ReLU"):
        bn.convert(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))


def test_lazy_layers_are_converted_after_their_first_input():
    model = nn.Sequential(nn.LazyBatchNorm2d())
    model(torch.randn(2, 3, 4, 4))
    assert type(bn.convert(model)[0]) is bn.BatchNorm2d


def test_a_layer_parametrized_while_it_was_ours_stays_ours_with_a_word():
    model = bn.convert(nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3)))
    parametrize.register_parametrization(model[0], "weight", Positive())
    with pytest.warns(UserWarning, match=r"(?s)reverted 1 of 2 batch norms.*BatchNorm2d \(0\): parametrized"):
        bn.revert(model)
    assert type(model[1]) is nn.BatchNorm2d
    assert isinstance(model[0], bn.BatchNorm2d)


def test_a_group_of_a_synchronized_layer_comes_back():
    layer = nn.SyncBatchNorm(3, process_group=(group := object()))
    bn.revert(bn.convert(bn.convert(layer), sync=True))
    assert layer.process_group is group


def test_a_layer_cast_while_it_was_ours_works_as_torchs():
    model = bn.convert(nn.BatchNorm1d(3)).bfloat16()
    bn.revert(model)(torch.randn(4, 3).bfloat16())
    assert model.running_mean.dtype == torch.bfloat16


OPTIONS = {"virtual_batch_size": 2, "nonfinite": "skip", "singleton": "running", "unbiased": False}


@pytest.mark.parametrize("options", [OPTIONS, {"renorm": bn.Renorm(2.0, 1.0)}, {"renorm": bn.Renorm(), "sync": True}])
@pytest.mark.parametrize("copied", [False, True])
def test_options_of_all_layers_are_those_of_layers_built_with_them_and_revert_undoes_them(options, copied):
    class Mine(nn.BatchNorm1d):
        def forward(self, input):
            return super().forward(input) + 1

    other = nn.BatchNorm1d if "virtual_batch_size" in options else nn.SyncBatchNorm
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Sequential(bn.BatchNorm1d(3), other(3)), Mine(3))
    before = [m.__dict__.keys() for m in bn.revert(copy.deepcopy(model)).modules()]
    classes = [type(m) for m in bn.revert(copy.deepcopy(model)).modules()]
    x = torch.randn(8, 3)
    built = bn.BatchNorm1d(3, **options)
    expected = built(x)
    assert bn.convert(model, **options) is model
    model = copy.deepcopy(model) if copied else model
    assert repr(model[0]) == repr(bn.BatchNorm1d(3, **options))
    assert torch.equal(model[0](x), expected)
    assert torch.equal(model[0].running_var, built.running_var)
    assert model[1][0].beyond_torch == model[0].beyond_torch
    assert model[1][1].renorm == options.get("renorm")
    bn.convert(model, nonfinite="skip")(x)  # again, and other
    bn.revert(model)
    assert [type(m) for m in model.modules()] == classes
    assert [m.__dict__.keys() for m in model.modules()] == before


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"nonfinite": "skpi"}, ValueError, "nonfinite must be one of"),
        ({"virtual_batch_size": 0}, ValueError, "positive integer"),
        ({"virtual_batch_size": 2, "sync": True}, ValueError, "virtual_batch_size excludes sync"),
        ({"renorm": bn.Renorm()}, ValueError, "cannot convert 1: virtual_batch_size excludes renorm"),
        ({"singleton": "running"}, ValueError, r"cannot convert 2\.0: singleton=\"running\" needs running statistics"),
        ({"channel_dim": -1}, TypeError, r"convert\(\) sets virtual_batch_size, .*; got channel_dim"),
    ],
)
def test_an_option_that_one_layer_cannot_have_raises_and_changes_nothing(options, error, message):
    untracked = nn.BatchNorm1d(3, track_running_stats=False)
    model = nn.Sequential(nn.BatchNorm1d(3), bn.BatchNorm1d(3, virtual_batch_size=4), nn.Sequential(untracked))
    before = repr(model)
    with pytest.raises(error, match=message):
        bn.convert(model, **options)
    assert type(model[0]) is nn.BatchNorm1d
    assert repr(model) == before


def test_reverting_undoes_what_convert_set_but_refuses_what_was_built():
    layer = bn.BatchNorm1d(3, nonfinite="skip")
    for nonfinite in ("propagate", "raise"):
        with pytest.raises(ValueError, match="it was built with nonfinite=skip, which"):
            bn.revert(bn.convert(layer, nonfinite=nonfinite))
        assert layer.nonfinite == nonfinite


@pytest.mark.parametrize("call", [bn.convert, bn.revert])
@pytest.mark.parametrize("model", [None, [nn.BatchNorm1d(3)], nn.BatchNorm1d], ids=str)
def test_what_is_no_module_raises(call, model):
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module.*got (NoneType|list|type)"):
        call(model)


def test_reverting_would_lose_an_activation_so_it_refuses_and_changes_nothing():
    model = nn.Sequential(bn.BatchNorm1d(3), nn.Sequential(bn.BatchNorm1d(3, activation="relu")))
    with pytest.raises(ValueError, match=r"cannot revert 1\.0.*relu"):
        bn.revert(model)
    assert type(model[0]) is bn.BatchNorm1d
