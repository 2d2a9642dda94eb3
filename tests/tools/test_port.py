"""bn.port without Keras or Flax: Flax's formula in NumPy, what is refused, and which mistakes check() names."""

import math
import types

import numpy as np
import pytest
import torch
from compare import assert_close
from torch import nn

import batchnorm as bn


class FlaxBatchNorm:
    """flax.linen.BatchNorm by its documentation; the channels last."""

    def __init__(self, channels, momentum=0.99, epsilon=1e-5, fast=True, dtype=np.float64):
        rng = np.random.default_rng(0)
        self.params = {"scale": rng.uniform(0.5, 2, channels), "bias": rng.normal(size=channels)}
        self.batch_stats = {"mean": rng.normal(size=channels), "var": rng.uniform(0.5, 2, channels)}
        self.momentum, self.epsilon, self.fast, self.dtype = momentum, epsilon, fast, dtype

    def __call__(self, x, training):
        x, stats = np.asarray(x, self.dtype), self.batch_stats
        mean, var = stats["mean"], stats["var"]
        if training:
            over = tuple(range(x.ndim - 1))
            mean = x.mean(over)
            var = np.maximum(0, (x**2).mean(over) - mean**2) if self.fast else ((x - mean) ** 2).mean(over)
            stats["mean"] = self.momentum * stats["mean"] + (1 - self.momentum) * mean
            stats["var"] = self.momentum * stats["var"] + (1 - self.momentum) * var
        multiplier = self.params["scale"] / np.sqrt(var + self.epsilon)
        return (x - mean) * multiplier + self.params["bias"]


SHAPES = {2: (12, 5), 3: (6, 4, 5), 4: (4, 3, 4, 5), 5: (3, 2, 3, 2, 5)}


@pytest.mark.parametrize("ndim", SHAPES)
@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("momentum", [0.99, 0.9])
def test_flaxs_formula_for_fifty_steps(ndim, fast, momentum):
    theirs = FlaxBatchNorm(5, momentum, fast=fast)
    ours = bn.port.from_flax(theirs.params, theirs.batch_stats, ndim=ndim, momentum=momentum)
    # Float64; 50 steps of sums of some 50 values; E[x^2] - E[x]^2 loses 10 times that at a mean of 3 deviations.
    ulps = 50 * 50 * 10
    for i in range(50):
        x = torch.randn(SHAPES[ndim], dtype=torch.float64) * 2 + i / 10
        assert_close(ours(x), torch.tensor(theirs(x, True)), ulps=ulps)
    for mine, other in ((ours.running_mean, "mean"), (ours.running_var, "var")):
        assert_close(mine, torch.tensor(theirs.batch_stats[other]), ulps=ulps)
    assert_close(ours.eval()(x), torch.tensor(theirs(x, False)), ulps=ulps)


@pytest.mark.parametrize("learned", [("scale", "bias"), ("scale",), ("bias",), ()])
def test_to_flax_and_back(learned):
    theirs = FlaxBatchNorm(5, momentum=0.9, epsilon=0.1)
    params = {name: theirs.params[name] for name in learned}
    ours = bn.port.from_flax(params, theirs.batch_stats, ndim=3, momentum=0.9, epsilon=0.1)
    back, stats, attributes = bn.port.to_flax(ours)
    uses = {"use_scale": "scale" in learned, "use_bias": "bias" in learned}
    assert attributes == {"axis": -1, "momentum": 0.9, "epsilon": 0.1, "use_fast_variance": False} | uses
    for mine, other in ((back, params), (stats, theirs.batch_stats)):
        assert mine.keys() == other.keys()
        assert all(np.array_equal(mine[name], other[name]) for name in other)
    ours(torch.randn(8, 4, 5, dtype=torch.float64))
    assert np.array_equal(stats["mean"], theirs.batch_stats["mean"])  # not the layer's memory
    assert bn.port.to_flax(bn.freeze(ours)).attributes["use_running_average"]


def test_arrays_may_be_of_any_kind_and_are_copied():
    wrapped = {name: types.SimpleNamespace(value=np.ones(3, np.float16)) for name in ("scale", "bias", "mean", "var")}
    assert bn.port.from_flax(wrapped, ndim=2).weight.dtype == torch.float32  # as flax.nnx's variables
    mean, var = torch.zeros(3), np.ones(3, np.float32)
    layer = bn.port.from_keras({"moving_mean": mean, "a/b/moving_variance:0": var}, ndim=2)
    assert (layer.weight, layer.bias) == (None, None)
    layer(torch.randn(8, 3) + 1)
    assert (mean.abs().max(), var.max()) == (0, 1)


@pytest.mark.parametrize(
    ("arrays", "ndim", "reason"),
    [
        ({"moving_mean": [0, 0]}, 2, "var is missing"),
        ({"moving_mean": [0, 0], "moving_variance": [1]}, 2, "one value per channel"),
        ({"moving_mean": [[0.0]], "moving_variance": [[1.0]]}, 2, "one value per channel"),
        ({"moving_mean": [0], "moving_variance": [1], "kernel": [1]}, 2, "expected the vectors of one layer"),
        ({"a/moving_mean": [0], "b/moving_mean": [0], "moving_variance": [1]}, 2, "expected the vectors of one layer"),
        ({"moving_mean": [0], "moving_variance": [1]}, None, "ndim must be"),
        ({"moving_mean": [0], "moving_variance": [1]}, 6, "ndim must be"),
        ({"moving_mean": ["a"], "moving_variance": [1]}, 2, "should hold numbers"),
        ({"weights": []}, 2, "call the layer on an input first"),
        ({"config": {"scale": False}, "weights": [[1], [1]]}, 2, "expected the weights beta, moving_mean"),
    ],
)
def test_what_is_no_batch_norm_raises(arrays, ndim, reason):
    with pytest.raises(ValueError, match=reason):
        bn.port.from_keras(arrays, ndim=ndim)


def test_other_things_raise():
    with pytest.raises(TypeError, match="Keras layer or a dict"):
        bn.port.from_keras(nn.BatchNorm1d(3))
    with pytest.raises(ValueError, match="expected scale, bias, mean and var"):
        bn.port.from_flax({"BatchNorm_0": {"scale": [1]}}, ndim=2)


def test_load_into_a_model_all_or_nothing():
    model = bn.convert(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(3)))
    source = FlaxBatchNorm(4)
    layer = bn.port.from_flax(source.params, source.batch_stats, ndim=4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="2 has"):
        bn.port.load(model, {"1": layer, "2": layer})
    with pytest.raises(ValueError, match="0 is a Conv2d, not a batch norm of ours"):
        bn.port.load(model, {"1": layer, "0": layer})
    with pytest.raises(AttributeError):
        bn.port.load(model, {"1": layer, "7": layer})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert (model[1].eps, model[1].momentum, model[1].unbiased) == (1e-5, 0.1, True)

    bn.port.load(model, {"1": layer})

    def channels_first(x, training):
        return np.moveaxis(source(np.moveaxis(x.numpy(), 1, -1), training), -1, 1)

    batches = torch.randn(20, 4, 4, 3, 3)
    assert bn.port.check(model[1], channels_first, batches[0], training=batches).ok


def original(**options):
    """A float32 layer of ours in Keras's conventions as the reference, trained by each call."""
    layer = bn.BatchNorm2d(4, **{"eps": 1e-3, "decay": 0.99, "unbiased": False, "channel_dim": -1, **options})
    nn.init.uniform_(layer.weight, 0.5, 2)
    nn.init.normal_(layer.bias)
    layer.running_var.fill_(0.05)
    return layer, lambda x, training: layer.train(training)(x)


MISTAKES = {
    "momentum": ({"momentum": 0.99}, "momentum=0.01"),
    "eps": ({"eps": 1e-5}, "eps=0.001 (Keras's default)"),
    "variance": ({"unbiased": True}, "the biased variance tracked"),
    "axis": ({"channel_dim": 1}, "channel_dim=3"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_check_names_the_mistake_and_only_that(case):
    mistake, named = MISTAKES[case]
    right, reference = original()
    layer = bn.BatchNorm2d(4, **{"eps": 1e-3, "momentum": 0.01, "unbiased": False, "channel_dim": -1, **mistake})
    layer.load_state_dict(right.state_dict())
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    batches = torch.randn(30, 4, 4, 5, 4)
    table = bn.port.check(layer, reference, batches[0], training=batches)
    assert not table.ok
    assert named in table[0].explanation
    assert ", or " not in table[0].explanation
    assert all(torch.equal(value, state[name]) for name, value in layer.state_dict().items())
    assert (layer.training, layer.momentum) == (True, mistake.get("momentum", 0.01))


def test_check_of_arrays_of_several_layers_and_of_what_nothing_explains():
    right, reference = original()
    x = torch.randn(6, 2, 2, 4)
    by_the_batch = reference(x, True)
    y = reference(x, False).detach().numpy()
    swapped = original()[0]
    swapped.load_state_dict(right.state_dict())
    swapped.weight, swapped.bias = swapped.bias, swapped.weight
    table = bn.port.check(
        {"same": right, "swapped": swapped, "mode": right, "other": right, "shape": right, "nan": right},
        {"same": y, "swapped": y, "mode": by_the_batch, "other": y + 1, "shape": y[:2], "nan": y * math.nan},
        dict.fromkeys(("same", "swapped", "mode", "other", "shape", "nan"), x),
    )
    assert [row.ok for row in table] == [True, False, False, False, False, False]
    assert "gamma and beta exchanged" in table[1].explanation
    assert "train mode" in table[2].explanation
    assert {row.explanation for row in table[3:]} == {"no change of one or two conventions explains it"}
    assert [row.error for row in table[4:]] == [math.inf, math.inf]
    assert abs(table[3].error - 1) < 1e-5
    assert str(table).splitlines()[1].split()[0] == "same"


def test_check_forgives_rounding_at_a_large_mean_and_not_more():
    theirs = FlaxBatchNorm(4, dtype=np.float32)  # so E[x^2] - E[x]^2 loses four of its seven digits
    for vectors in (theirs.params, theirs.batch_stats):
        vectors |= {name: vector.astype(np.float32) for name, vector in vectors.items()}
    layer = bn.port.from_flax(theirs.params, theirs.batch_stats, ndim=2)
    batches = torch.randn(20, 16, 4) + 100
    assert bn.port.check(layer, theirs, batches[0], training=batches).ok
    theirs.params["bias"] = theirs.params["bias"] + 0.1
    assert not bn.port.check(layer, theirs, batches[0], training=batches).ok
