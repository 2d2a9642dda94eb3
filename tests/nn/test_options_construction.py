"""Options when a layer is built, copied, converted, shown and reset; center, scale, decay, initializers."""

import copy
import pickle

import pytest
import torch
from cases import make, torchs
from stepping import assert_step, randomize
from torch import nn

import batchnorm as bn
from batchnorm.nn.layer import BatchNormLayer
from batchnorm.ops import cpu

ALL = {
    "activation": "relu",
    "virtual_batch_size": 2,
    "renorm": bn.Renorm(2.0, 1.0),
    "sync": True,
    "nonfinite": "skip",
    "singleton": "running",
    "channel_dim": -1,
    "unbiased": False,
}
EACH = [{name: value} for name, value in ALL.items()]


@pytest.mark.parametrize(
    ("options", "parameters"),
    [
        ({}, ["weight", "bias"]),
        ({"center": False}, ["weight"]),
        ({"bias": False}, ["weight"]),
        ({"scale": False}, ["bias"]),
        ({"center": False, "scale": False}, []),
        ({"affine": False, "center": True}, []),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_center_and_scale_learn_what_they_say(options, parameters, training):
    layer = randomize(bn.BatchNorm2d(3, activation="silu", **options)).train(training)
    assert [name for name, _ in layer.named_parameters()] == parameters
    assert_step(layer, make((4, 3, 5, 6)), residual=make((4, 3, 5, 6)))
    twin = bn.BatchNorm2d(3, **options)
    twin.load_state_dict(layer.state_dict())  # strictly
    if options.get("scale", True):
        theirs = torchs(nn.BatchNorm2d, 3, affine=bool(parameters), bias="bias" in parameters)
        theirs.load_state_dict(layer.state_dict())
        layer.load_state_dict(theirs.state_dict())
    assert ("scale=False" in repr(layer)) == ("weight" not in parameters and options.get("affine", True))


def test_a_state_with_a_gamma_too_many_does_not_load_strictly():
    with pytest.raises(RuntimeError, match=r"Unexpected key.*weight"):
        bn.BatchNorm1d(3, scale=False).load_state_dict(nn.BatchNorm1d(3).state_dict())


def test_initializers_are_numbers_or_functions_and_reset_uses_them_again():
    given = {"weight": 0.5, "bias": nn.init.normal_, "running_mean": lambda t: t.fill_(2.0), "running_var": 3}
    layer = bn.BatchNorm1d(1000, initializers=given)
    for _ in range(2):
        assert layer.weight.eq(0.5).all()
        assert layer.weight.requires_grad
        assert 0.9 < layer.bias.std() < 1.1  # of 1000 values: 0.02 is one standard error
        assert layer.running_mean.eq(2).all()
        assert layer.running_var.eq(3).all()
        layer(make((8, 1000)))
        with torch.no_grad():
            layer.weight.zero_()
            layer.bias.zero_()
        assert not layer.running_mean.eq(2).all()
        layer.reset_parameters()
        assert int(layer.num_batches_tracked) == 0
    layer(make((8, 1000)))
    layer.reset_running_stats()
    assert layer.running_mean.eq(2).all()


def test_reset_without_initializers_is_torchs():
    layer = randomize(bn.BatchNorm1d(3))
    layer.reset_parameters()
    expected = nn.BatchNorm1d(3).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in layer.state_dict().items())


@pytest.mark.parametrize(("options", "momentum"), [({"decay": 0.99}, 0.01), ({"decay": 0.0}, 1.0), ({}, 0.1)])
@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("compiled", [True, False])
def test_decay_is_one_minus_momentum_and_unbiased_chooses_the_variance(
    compiled, unbiased, options, momentum, monkeypatch
):
    monkeypatch.setattr(cpu, "COMPILED", compiled)
    layer = randomize(bn.BatchNorm1d(3, unbiased=unbiased, **options))
    assert layer.momentum == pytest.approx(momentum, abs=1e-15)
    before = layer.running_var.double()
    x = make((5, 3))
    assert_step(layer, x)
    expected = (1 - momentum) * before + momentum * x.double().var(0, unbiased=unbiased)
    torch.testing.assert_close(layer.running_var.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("option", [*EACH, {"scale": False}, {"initializers": {"weight": 2.0}}], ids=str)
def test_copies_and_pickles_are_the_same_layer(option):
    layer = bn.BatchNorm1d(3, **option)
    x = make((6, 3))
    layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert repr(other) == repr(layer)
        assert other.beyond_torch == layer.beyond_torch
        assert other.initializers == layer.initializers
        assert torch.equal(other.train()(x), copy.deepcopy(layer)(x))


@pytest.mark.parametrize("option", EACH, ids=str)
def test_each_option_shows_in_repr_and_revert_refuses_to_drop_it(option):
    (name, value), layer = *option.items(), bn.BatchNorm1d(3, **option)
    assert f", {name}={value}" in repr(layer)
    model = nn.Sequential(bn.BatchNorm1d(3), layer)
    with pytest.raises(ValueError, match=f"cannot revert 1: it was built with {name}="):
        bn.revert(model)
    assert type(model[0]) is bn.BatchNorm1d
    assert bn.convert(model)[1] is layer


def test_every_option_is_in_the_list_above():
    options = set(bn.BatchNorm1d.__init__.__annotations__) - {"return"}
    theirs = {"num_features", "eps", "momentum", "affine", "track_running_stats", "device", "dtype", "bias"}
    tested_alone = {"center", "scale", "decay", "initializers", "process_group"}
    assert options - theirs - tested_alone == set(ALL)


@pytest.mark.parametrize("options", [{"scale": False}, {"decay": 0.99}, {"initializers": {"weight": 2.0}}], ids=str)
def test_what_torchs_layer_can_do_too_reverts(options):
    layer = randomize(bn.BatchNorm1d(3, **options))
    x = make((6, 3))
    expected = copy.deepcopy(layer)(x)
    bn.revert(layer)
    assert type(layer) is nn.BatchNorm1d
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-6)
    assert vars(layer).keys() == vars(nn.BatchNorm1d(3)).keys()


def test_a_converted_layer_has_the_options_unset():
    layer = bn.convert(nn.BatchNorm1d(3))
    assert layer.beyond_torch == {}
    assert layer.virtual_batch_size is None
    assert layer.skipped == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nonfinite": "ignore"}, "nonfinite must be one of 'propagate', 'skip', 'raise', but got 'ignore'"),
        ({"singleton": "skip"}, "singleton must be one of 'raise', 'running', but got 'skip'"),
        ({"virtual_batch_size": 0}, "positive"),
        ({"virtual_batch_size": True}, "positive integer.*got True"),
        ({"virtual_batch_size": 4, "sync": True}, "virtual_batch_size excludes sync"),
        ({"virtual_batch_size": 4, "renorm": bn.Renorm()}, "virtual_batch_size excludes renorm"),
        ({"renorm": True}, "renorm must be a Renorm"),
        ({"renorm": bn.Renorm(), "track_running_stats": False}, "renorm needs running statistics"),
        ({"singleton": "running", "track_running_stats": False}, 'singleton="running" needs running statistics'),
        ({"nonfinite": "skip", "track_running_stats": False}, "nonfinite='skip' needs running statistics"),
        ({"decay": 0.9, "momentum": 0.2}, "replaces momentum: give one"),
        ({"decay": 0.9, "momentum": None}, "replaces momentum: give one"),
        ({"decay": 1.1}, "from 0 to 1"),
        ({"channel_dim": 0}, "channel_dim must be an integer, and not be 0"),
        ({"channel_dim": "last"}, "channel_dim must be an integer.*; got 'last'"),
        ({"channel_dim": 1.5}, "channel_dim must be an integer.*; got 1.5"),
        ({"initializers": {"gamma": 1.0}}, "got gamma"),
        ({"initializers": {"weight": "zeros"}}, "the initializer of weight must be a number.*; got 'zeros'"),
        ({"activation": "swish"}, "activation must be"),
    ],
)
def test_options_that_contradict_each_other_raise(options, message):
    with pytest.raises(ValueError, match=message):
        bn.BatchNorm1d(3, **options)


def test_a_bad_option_for_the_call_alone_raises_and_changes_nothing():
    layer = bn.BatchNorm1d(3)
    with pytest.raises(ValueError, match="activation must be"):
        layer(make((4, 3)), activation="swish")
    assert int(layer.num_batches_tracked) == 0


def test_all_options_that_go_together_do():
    layer = randomize(bn.BatchNorm1d(3, **{k: v for k, v in ALL.items() if k not in ("renorm", "sync")}))
    mask = torch.rand(7, 5) < 0.7
    x = torch.where(mask[..., None], make((7, 5, 3)), torch.nan)
    assert_step(layer, x, mask=mask, residual=make((7, 5, 3)))
    assert isinstance(layer, BatchNormLayer)


@pytest.mark.parametrize(
    ("built_with", "name", "value"),
    [
        ({}, "nonfinite", "skpi"),
        ({}, "singleton", "runing"),
        ({}, "renorm", True),
        ({}, "virtual_batch_size", 0),
        ({}, "virtual_batch_size", True),
        ({}, "channel_dim", 1.5),
        ({}, "activation", "swish"),
        ({"virtual_batch_size": 4}, "sync", True),
        ({"renorm": bn.Renorm()}, "virtual_batch_size", 4),
        ({"track_running_stats": False}, "nonfinite", "skip"),
    ],
)
def test_an_option_set_later_raises_what_the_constructor_raises(built_with, name, value):
    with pytest.raises(ValueError, match=name) as constructor:
        bn.BatchNorm1d(3, **built_with, **{name: value})
    layer = bn.BatchNorm1d(3, **built_with)
    before = repr(layer)
    with pytest.raises(ValueError, match=name) as later:
        setattr(layer, name, value)
    assert str(later.value) == str(constructor.value)
    assert repr(layer) == before


@pytest.mark.parametrize("option", EACH, ids=str)
def test_an_option_set_later_is_one_built_with(option):
    layer = bn.convert(nn.BatchNorm1d(3))
    for name, value in option.items():
        setattr(layer, name, value)
    assert repr(layer) == repr(bn.BatchNorm1d(3, **option))


@pytest.mark.parametrize(
    ("activation", "shown"),
    [(nn.LeakyReLU(0.3), "leaky_relu(0.3)"), ("leaky_relu", "leaky_relu"), (nn.ELU(), "elu"), (nn.ELU(2), "elu(2)")],
)
def test_repr_shows_the_slope_that_is_not_the_usual(activation, shown):
    assert repr(bn.BatchNorm1d(3, activation=activation)).endswith(f", activation={shown})")


def test_decay_makes_the_momentum_that_was_meant():
    assert bn.BatchNorm1d(3, decay=0.99).momentum == 0.01
    assert "momentum=0.01," in repr(bn.BatchNorm1d(3, decay=0.99))


@pytest.mark.parametrize("given", ["relu", nn.ReLU(), nn.ReLU])
def test_an_activation_set_later_is_the_one_of_a_layer_built_with_it(given):
    layer, built = bn.convert(nn.BatchNorm1d(3)), bn.BatchNorm1d(3, activation=given)
    layer.activation = given
    x = make((4, 3))
    assert torch.equal(layer(x), built(x))
    assert repr(layer) == repr(built)
    with pytest.raises(ValueError, match="activation must be"):
        layer.activation = "swish"
    assert layer.activation == built.activation


def test_statistics_assigned_from_a_half_precision_checkpoint_are_float32():
    """In bfloat16 the average stalls: 0.1 of a difference under 1/25 of 3 is less than half an ulp."""
    layer = bn.BatchNorm1d(3)
    layer.load_state_dict(nn.BatchNorm1d(3).bfloat16().state_dict(), assign=True)
    assert (layer.weight.dtype, layer.running_mean.dtype, layer.running_var.dtype) == (
        torch.bfloat16,
        torch.float32,
        torch.float32,
    )
