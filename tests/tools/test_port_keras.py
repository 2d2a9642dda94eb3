"""bn.port with Keras itself, on its PyTorch backend: the same numbers step for step, and there and back."""

import inspect
import pickle

import numpy as np
import pytest
import torch
from compare import assert_close
from torch import nn

import batchnorm as bn

# Keras's own get_weights() and set_weights() on this backend.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SHAPES = {2: (12, 5), 3: (6, 4, 5), 4: (4, 3, 4, 5), 5: (3, 2, 3, 2, 5)}
OPTIONS = {
    "2": (2, {}),
    "3": (3, {}),
    "4": (4, {}),
    "5": (5, {}),
    "axis": (4, {"axis": 1}),
    "momentum, epsilon": (2, {"momentum": 0.9, "epsilon": 0.1}),
    "no gamma": (4, {"scale": False}),
    "no beta": (4, {"center": False}),
    "neither": (3, {"scale": False, "center": False}),
    "not trainable": (4, {"trainable": False}),
}
# Keras computes in float32 even in a layer of float64. Its variance is E[x^2] - E[x]^2, here with a mean of up to 3
# deviations: off by some ten roundings. A step rounds a running statistic by half an ulp, 50 of them by 25 at most.
ULPS = 32


def built(keras, ndim, **options):
    """A Keras layer that has seen an input, with vectors of its own."""
    layer = keras.layers.BatchNormalization(**options)
    layer.build(SHAPES[ndim])
    layer.set_weights([np.random.default_rng(i).uniform(0.5, 2, w.shape) for i, w in enumerate(layer.get_weights())])
    return layer


def assert_same(ours, theirs):
    """Within Keras's rounding."""
    assert_close(ours, theirs.detach().double(), ulps=ULPS)


def step(parameters, y, target):
    """One step of gradient descent."""
    parameters = [p for p in parameters if p.requires_grad]
    if parameters:
        gradients = torch.autograd.grad((y * target).sum(), parameters)
        with torch.no_grad():
            for p, gradient in zip(parameters, gradients, strict=True):
                p -= 0.01 * gradient


@pytest.mark.parametrize("case", OPTIONS)
def test_fifty_steps_of_training_and_then_eval(keras, case):
    ndim, options = OPTIONS[case]
    theirs = built(keras, ndim, **options)
    ours = bn.port.from_keras(theirs)
    for i in range(50):
        x, target = torch.randn(SHAPES[ndim]) * 2 + i / 10, torch.randn(SHAPES[ndim])
        y, z = ours(x), theirs(x, training=True)
        assert_same(y, z)
        step(ours.parameters(), y, target)
        step([v.value for v in theirs.trainable_variables], z, target)
    vectors = [v for v in (ours.weight, ours.bias, ours.running_mean, ours.running_var) if v is not None]
    for mine, other in zip(vectors, theirs.get_weights(), strict=True):
        assert_same(mine, torch.tensor(other))
    x = torch.randn(SHAPES[ndim])
    assert_same(ours.eval()(x), theirs(x, training=False))


def test_numbers_that_are_only_copied_are_not_the_same(keras):
    """What the conventions are for: torch.nn's layer with Keras's vectors and Keras's arguments."""
    theirs = built(keras, 2)
    copied = nn.BatchNorm1d(5, eps=theirs.epsilon, momentum=theirs.momentum)
    state = dict(
        zip(["weight", "bias", "running_mean", "running_var"], map(torch.tensor, theirs.get_weights()), strict=True)
    )
    copied.load_state_dict(state, strict=False)
    ours, batches = bn.port.from_keras(theirs), torch.randn(2, *SHAPES[2]) + 3
    for layer, same in ((ours, True), (copied, False)):
        weights = theirs.get_weights()
        table = bn.port.check(layer, lambda x, training: theirs(x, training=training), batches[0], training=batches)
        theirs.set_weights(weights)
        assert table.ok == same
    assert table[0].error > 0.1
    assert table[0].explanation.startswith("it would agree with momentum=0.01 (")
    assert "and the biased variance tracked" in table[0].explanation


@pytest.mark.parametrize("case", OPTIONS)
def test_to_keras_and_back(keras, case):
    ndim, options = OPTIONS[case]
    ours = bn.port.from_keras(built(keras, ndim, **options))
    config, weights = ported = bn.port.to_keras(ours)
    theirs = ported.layer(ndim)
    x = torch.randn(SHAPES[ndim])
    assert_same(ours.eval()(x), theirs(x, training=False))
    again = bn.port.from_keras({"config": config, "weights": weights}, ndim=ndim)
    assert repr(again) == repr(ours)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), ours.state_dict().values(), strict=True))


def test_channels_can_go_to_where_pytorch_has_them(keras):
    theirs = built(keras, 4)
    ours = bn.port.from_keras(theirs, channel_dim=1)
    x = torch.randn(SHAPES[4])
    assert_same(ours(x.movedim(-1, 1)).movedim(1, -1), theirs(x, training=True))
    assert bn.port.to_keras(ours, axis=-1).config["axis"] == -1


ONES = {"moving_mean": [0.0, 1.0], "moving_variance": [1.0, 2.0]}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"eps": 1e-5}, "no argument 'eps'; Keras calls it epsilon"),
        ({"decay": 0.9}, "no argument 'decay'; Keras calls it momentum"),
        ({"momentun": 0.9}, "no argument 'momentun'; is momentum meant"),
        ({"foo": 1}, "no argument 'foo'; it has axis, momentum, epsilon"),
    ],
    ids=str,
)
def test_an_argument_that_is_none_raises(config, said):
    with pytest.raises(TypeError, match=said):
        bn.port.from_keras(ONES, ndim=2, **config)


def test_what_of_a_config_cannot_be_taken_over_is_said():
    for axis in (np.int64(1), [1], (1,)):
        assert bn.port.from_keras(ONES, ndim=4, axis=axis).channel_dim == 1
    with pytest.raises(ValueError, match=r"axis=\[1, 3\]: .* PyTorch's layers have one dimension of channels"):
        bn.port.from_keras({"config": {"axis": [1, 3]}, "weights": ONES}, ndim=4)
    for config, said in (
        ({"eps": 1e-5}, "ignored: eps"),
        (
            {"gamma_regularizer": {"class_name": "L2"}, "beta_constraint": None},
            "do not belong to the layer: gamma_regularizer$",
        ),
    ):
        with pytest.warns(UserWarning, match=said) as warned:
            layer = bn.port.from_keras({"config": config, "weights": ONES}, ndim=2)
        assert layer.eps == 1e-3
        assert warned[0].filename == __file__


def virtual(x, mean, variance, size):
    """One step by TensorFlow's source: batches cut in order, the running statistics after the mean of the parts'."""
    parts = x.view(-1, size, x.size(1))
    means, variances = parts.mean(1, keepdim=True), parts.var(1, correction=0, keepdim=True)
    y = ((parts - means) / (variances + 1e-3).sqrt()).view_as(x)
    return y, 0.99 * mean + 0.01 * means.mean((0, 1)), 0.99 * variance + 0.01 * variances.mean((0, 1))


def test_tensorflows_virtual_batches_are_kept():
    with pytest.warns(UserWarning, match="virtual_batch_size=4 is kept, but the running variance"):
        layer = bn.port.from_keras({"config": {"virtual_batch_size": 4}, "weights": [torch.ones(2)] * 4}, ndim=2)
    layer = layer.double()
    layer.bias.data.zero_()
    x = torch.randn(12, 2, dtype=torch.float64) * 3
    y, mean, variance = virtual(x, 1.0, 1.0, 4)
    assert_close(layer(x), y, ulps=64)
    assert_close(layer.running_mean, mean, ulps=64)
    whole = 0.99 + 0.01 * x.var(0, correction=0)  # ours follows the union, as was said
    assert_close(layer.running_var, whole, ulps=64)
    assert (layer.running_var - variance).abs().max() > 1e-3


LIMITS = {"rmax": 1.5, "rmin": 1 / 1.5, "dmax": 0.5}
RENORM = {"renorm": True, "renorm_clipping": LIMITS, "renorm_momentum": 0.8, "momentum": 0.9, "epsilon": 0.01}


def renormalized(x, vectors):
    """One step of Keras's renormalization, by its documentation, in float64."""
    gamma, beta, moving_mean, _, moving_stddev, renorm_mean, renorm_stddev = vectors
    mean, stddev = x.mean(0), (x.var(0, correction=0) + RENORM["epsilon"]).sqrt()
    r = (stddev / renorm_stddev).clamp(LIMITS["rmin"], LIMITS["rmax"])
    d = ((mean - renorm_mean) / renorm_stddev).clamp(-LIMITS["dmax"], LIMITS["dmax"])
    y = ((x - mean) / stddev * r + d) * gamma + beta
    renorm_mean, renorm_stddev = 0.8 * renorm_mean + 0.2 * mean, 0.8 * renorm_stddev + 0.2 * stddev
    moving_mean, moving_stddev = 0.9 * moving_mean + 0.1 * mean, 0.9 * moving_stddev + 0.1 * stddev
    variance = moving_stddev**2 - RENORM["epsilon"]
    return y, [gamma, beta, moving_mean, variance, moving_stddev, renorm_mean, renorm_stddev]


def test_renormalization_by_its_formula():
    """Not every version of Keras has it."""
    vectors = list(torch.rand(7, 5, dtype=torch.float64) + 0.5)
    ours = bn.port.from_keras({"config": RENORM, "weights": vectors}, ndim=2)
    for i in range(50):
        ours = pickle.loads(pickle.dumps(ours))
        x = torch.randn(SHAPES[2], dtype=torch.float64) * 2 + i / 20
        y, vectors = renormalized(x, vectors)
        # Float64: sums of 12, some 30 operations on numbers up to the largest output, in each of 50 steps.
        assert_close(ours(x), y, ulps=50 * 30)
    names = ("weight", "bias", "running_mean", "running_var", "moving_stddev", "renorm_mean", "renorm_stddev")
    for name, vector in zip(names, vectors, strict=True):
        assert_close(ours.state_dict()[name], vector, ulps=50 * 30)
    gamma, beta, mean, var = vectors[:4]
    assert_close(ours.eval()(x), gamma * (x - mean) / (var + 0.01).sqrt() + beta, ulps=50 * 30)
    assert ours.num_batches_tracked == 50


def test_renormalization_beside_keras(keras):
    if "renorm" not in inspect.signature(keras.layers.BatchNormalization).parameters:
        pytest.skip("this Keras, the last one for Python 3.10, has no renorm")
    theirs = built(keras, 4, **RENORM)
    ours = bn.port.from_keras(theirs)
    batches = torch.randn(50, *SHAPES[4]) + 1
    table = bn.port.check(ours, lambda x, training: theirs(x, training=training), batches[0], training=batches)
    assert table.ok, table


def test_an_input_that_raises_or_is_not_tracked_leaves_the_averages():
    ours = bn.port.from_keras({"config": RENORM, "weights": list(torch.rand(7, 5) + 0.5)}, ndim=2)
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    with pytest.raises(RuntimeError, match="5"):
        ours(torch.randn(8, 4))
    with bn.no_update(ours):
        ours(torch.randn(8, 5))
    bn.freeze(ours)(torch.randn(8, 5))
    assert all(torch.equal(value, before[name]) for name, value in ours.state_dict().items())


@pytest.mark.parametrize(
    ("clipping", "count", "why"), [(None, 4, "it has no moving_stddev"), ({"rmax": 2.0}, 7, "whatever rmin is")]
)
def test_renormalization_that_will_differ_in_training_says_so(clipping, count, why):
    vectors = list(torch.rand(7, 5, dtype=torch.float64) + 0.5)[:count]
    names = ("gamma", "beta", "moving_mean", "moving_variance", "moving_stddev", "renorm_mean", "renorm_stddev")
    with pytest.warns(UserWarning, match=why):
        ours = bn.port.from_keras(
            dict(zip(names, vectors, strict=False)), ndim=2, renorm=True, renorm_clipping=clipping
        )
    x = torch.randn(SHAPES[2], dtype=torch.float64)
    gamma, beta, mean, var = vectors[:4]
    # A handful of operations on each value.
    assert_close(ours.eval()(x), gamma * (x - mean) / (var + 1e-3).sqrt() + beta, ulps=16)


def test_what_keras_does_not_have():
    with pytest.warns(
        UserWarning, match="Keras tracks the biased variance, this layer the unbiased, and is without virtual"
    ):
        bn.port.to_keras(bn.BatchNorm1d(3, virtual_batch_size=2))
    for layer, reason in (
        (bn.BatchNorm1d(3, activation="relu"), "apply relu after it"),
        (nn.BatchNorm1d(3, momentum=None), "no cumulative average"),
        (nn.BatchNorm1d(3, track_running_stats=False), "track_running_stats=False|has running statistics"),
    ):
        with pytest.raises(ValueError, match=reason):
            bn.port.to_keras(layer)
