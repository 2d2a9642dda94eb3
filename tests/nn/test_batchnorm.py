"""The layers beside torch.nn's: the same state, errors, copies and training, step by step."""

import copy
import io
import pickle

import pytest
import torch
from cases import make, torchs
from compare import assert_close
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.utils import prune

import batchnorm as bn
from batchnorm.ops import cpu

PAIRS = [(nn.BatchNorm1d, bn.BatchNorm1d), (nn.BatchNorm2d, bn.BatchNorm2d), (nn.BatchNorm3d, bn.BatchNorm3d)]
SHAPES = {1: (6, 3, 5), 2: (4, 3, 5, 6), 3: (2, 3, 3, 4, 5)}
OPTIONS = [
    {},
    {"eps": 1e-3, "momentum": 0.4},
    {"momentum": None},
    {"momentum": 0.0},
    {"affine": False},
    {"bias": False},
    {"track_running_stats": False},
    {"dtype": torch.float64},
]


def pair(rank, **options):
    cls, our_cls = PAIRS[rank - 1]
    theirs, ours = torchs(cls, 3, **options), our_cls(3, **options)
    with torch.no_grad():
        for p in theirs.parameters():
            p.uniform_(-1, 1)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("rank", SHAPES)
def test_training_and_eval_agree_with_torchs(rank, options):
    theirs, ours = pair(rank, **options)
    exact = copy.deepcopy(theirs).double()
    dtype = options.get("dtype", torch.float32)
    for step in range(4):
        for layer in (theirs, ours, exact):
            layer.train(step % 3 != 2)
        x, dy = make(SHAPES[rank], dtype), make(SHAPES[rank], dtype)
        outputs, inputs = [], []
        for layer in (theirs, ours, exact):
            t = x.to(torch.float64 if layer is exact else dtype, copy=True).requires_grad_()
            layer.zero_grad()
            y = layer(t)
            y.backward(dy.to(y.dtype))
            outputs.append(y)
            inputs.append(t.grad)
        assert_close(outputs[1], outputs[2], peer=outputs[0])
        assert_close(inputs[1], inputs[2], peer=inputs[0])
        sums = dy.double().abs().sum().item()
        for a, b, c in zip(theirs.parameters(), ours.parameters(), exact.parameters(), strict=True):
            assert_close(b.grad, c.grad, peer=a.grad, scale=sums)
        for (name, a), b, c in zip(theirs.named_buffers(), ours.buffers(), exact.buffers(), strict=True):
            if name == "num_batches_tracked":
                assert torch.equal(a, b)
            else:
                assert_close(b, c, peer=a)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("rank", SHAPES)
def test_state_dict_goes_both_ways_and_repr_is_the_same(rank, options):
    cls, our_cls = PAIRS[rank - 1]
    theirs, ours = torchs(cls, 3, **options), our_cls(3, **options)
    assert repr(ours) == repr(theirs)
    assert {k: (v.dtype, v.shape) for k, v in ours.state_dict().items()} == {
        k: (v.dtype, v.shape) for k, v in theirs.state_dict().items()
    }
    assert ours.state_dict()._metadata == theirs.state_dict()._metadata
    ours(make(SHAPES[rank], options.get("dtype", torch.float32)))
    theirs.load_state_dict(ours.state_dict())
    for a, b in zip(theirs.state_dict().values(), ours.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    old = {k: v for k, v in theirs.state_dict().items() if k != "num_batches_tracked"}
    ours.load_state_dict(old)  # checkpoints from before the counter existed


@pytest.mark.parametrize("options", [{}, {"activation": "relu"}, {"activation": nn.LeakyReLU(0.3), "momentum": None}])
def test_copies_and_pickles_compute_the_same(options):
    layer = bn.BatchNorm2d(3, **options)
    x = make(SHAPES[2])
    layer(x)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(buffer, weights_only=False)]
    expected = layer(x)
    for other in copies:
        assert other.measured is None
        assert torch.equal(other(x), expected)
        assert repr(other) == repr(layer)
        for a, b in zip(other.state_dict().values(), layer.state_dict().values(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(("theirs", "ours"), PAIRS)
@pytest.mark.parametrize(
    "shape", [(3,), (1, 3), (2, 3), (2, 3, 4), (2, 3, 4, 4), (2, 3, 4, 4, 4), (2, 5, 4, 4), (1, 3, 1, 1)]
)
def test_a_wrong_input_raises_what_torchs_raises_and_changes_nothing(theirs, ours, shape):
    a, b = theirs(3), ours(3)
    x = torch.randn(shape)
    try:
        a(x)
    except Exception as error:
        with pytest.raises(type(error)):
            b(x)
        fresh = ours(3).state_dict()
        assert all(torch.equal(v, fresh[k]) for k, v in b.state_dict().items())
    else:
        b(x)


def test_gamma_and_beta_are_weight_and_bias():
    layer = bn.BatchNorm1d(3)
    assert layer.gamma is layer.weight
    assert layer.beta is layer.bias
    assert bn.BatchNorm1d(3, affine=False).gamma is None


def test_the_measured_moments_are_those_of_the_last_training_batch():
    layer = bn.BatchNorm2d(3)
    assert layer.measured is None
    x = make(SHAPES[2])
    layer(x)
    expected = bn.Moments.measure(x)
    assert layer.measured.count.item() == 4 * 5 * 6
    # Short sums in float32, and x - mean rounded to float32 before it is squared: an ulp of the largest |x|, 10.
    torch.testing.assert_close(layer.measured.mean, expected.mean, rtol=0, atol=10 * 2**-23)
    torch.testing.assert_close(layer.measured.m2, expected.m2, rtol=2**-22, atol=0)
    measured = layer.measured
    layer.eval()(make(SHAPES[2]))
    assert layer.measured is measured


def test_residual_activation_and_mask_reach_the_function():
    layer = bn.BatchNorm1d(3, activation="tanh")
    x, residual, mask = make((4, 3, 5)), make((4, 3, 5)), torch.rand(4, 5) < 0.5
    expected = bn.batch_norm(x, training=True, residual=residual, activation="tanh", mask=mask)
    assert torch.equal(layer(x, residual=residual, mask=mask), expected)
    assert "activation=tanh" in repr(layer)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_running_statistics_stay_float32_when_the_module_is_cast(dtype):
    constructed = bn.BatchNorm1d(2, dtype=dtype, momentum=1e-3)
    cast = nn.Sequential(bn.BatchNorm1d(2, momentum=1e-3)).to(dtype)[0]
    x = make((64, 2), dtype, mean=3.0)
    for layer in (constructed, cast):
        assert layer.weight.dtype == dtype
        assert layer.running_mean.dtype == layer.running_var.dtype == torch.float32
        for _ in range(1200):
            layer(x)
        # In bfloat16 the average stalls at a third of the way: momentum * 2 is less than half an ulp of 1.
        expected = (1 - (1 - 1e-3) ** 1200) * x.double().mean(0)
        torch.testing.assert_close(layer.running_mean.double(), expected, rtol=1e-3, atol=0)
        assert layer(x).dtype == dtype
    assert constructed.double().running_mean.dtype == torch.float64


def test_casting_keeps_the_statistics_it_had():
    layer = bn.BatchNorm1d(2)
    layer.running_mean.fill_(1 / 3)
    layer.bfloat16()
    assert layer.running_mean.eq(torch.tensor(1 / 3)).all()


def test_autocast_gives_what_torchs_gives():
    x = make((4, 2, 6, 6))
    theirs = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU())
    ours = bn.convert(copy.deepcopy(theirs))
    exact = copy.deepcopy(theirs).double()
    with torch.autocast("cpu", torch.bfloat16):
        a, b = theirs(x), ours(x)
    assert a.dtype == b.dtype == torch.bfloat16
    assert_close(b, exact(x.double()), peer=a)


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_layer_compiles_without_a_graph_break(momentum):
    layer = bn.BatchNorm2d(3, momentum=momentum, activation="relu")
    eager = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True)
    for _ in range(3):
        x = make(SHAPES[2])
        torch.testing.assert_close(compiled(x), eager(x), rtol=1e-6, atol=1e-6)
    for a, b in zip(layer.buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_functional_call_reads_the_given_tensors():
    layer = bn.BatchNorm1d(3).eval()
    x = make((4, 3))
    given = {"weight": torch.full((3,), 2.0), "bias": torch.ones(3)}
    y = torch.func.functional_call(layer, given, (x,))
    torch.testing.assert_close(y, layer(x) * 2 + 1)


def test_vmap_over_an_ensemble_tracks_each_members_statistics():
    def ensemble(cls):
        torch.manual_seed(0)
        members = [nn.Sequential(nn.Linear(4, 3), cls(3)) for _ in range(5)]
        parameters, buffers = torch.func.stack_module_state(members)
        skeleton = copy.deepcopy(members[0]).to("meta")
        x = make((8, 4))
        y = torch.func.vmap(lambda p, b: torch.func.functional_call(skeleton, (p, b), (x,)))(parameters, buffers)
        return y, buffers

    y, buffers = ensemble(bn.BatchNorm1d)
    expected, expected_buffers = ensemble(nn.BatchNorm1d)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(buffers, expected_buffers, rtol=1e-5, atol=1e-6)


def dense():
    return nn.Sequential(
        *(nn.Flatten(), nn.Linear(64, 50), nn.BatchNorm1d(50), nn.Sigmoid()),
        *(nn.Linear(50, 50), nn.BatchNorm1d(50), nn.Sigmoid(), nn.Linear(50, 10)),
    )


def convolutional():
    # Smooth activations: relu's kink would let a rounding grow into another path.
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Tanh(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.Tanh(), nn.Flatten(), nn.Linear(256, 10)),
    )


@pytest.mark.slow
@pytest.mark.parametrize("network", [dense, convolutional])
def test_two_hundred_steps_in_lockstep_with_torchs_on_real_data(network):
    """The same losses, to the rounding that 200 steps of SGD carry along, as torch.nn's layers on digits."""
    digits = load_digits()
    x, target = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(digits.target)
    theirs = network()
    ours = bn.convert(copy.deepcopy(theirs))
    losses = []
    for model in (theirs, ours):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        generator = torch.Generator().manual_seed(0)
        curve = []
        for _ in range(200):
            batch = torch.randint(len(x), (60,), generator=generator)
            loss = nn.functional.cross_entropy(model(x[batch]), target[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
        losses.append(torch.tensor(curve))
    torch.testing.assert_close(losses[1], losses[0], rtol=0, atol=1e-5)
    for name, buffer in theirs.named_buffers():
        torch.testing.assert_close(ours.get_buffer(name), buffer, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_traced_cumulative_average_goes_on_averaging():
    """A count that is read while tracing would be the same in every replay."""
    torch.manual_seed(0)
    batches, theirs = torch.randn(3, 8, 3) + 2, nn.BatchNorm1d(3, momentum=None)
    ours = torch.jit.trace(bn.BatchNorm1d(3, momentum=None), torch.zeros(8, 3), check_trace=False)
    ours.load_state_dict(theirs.state_dict())  # tracing itself tracked
    for x in batches:
        theirs(x)
        ours(x)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


@pytest.mark.parametrize("compiled", [True, False], ids=["cpu", "native"])
@pytest.mark.parametrize("training", [True, False])
def test_a_pruned_layer_multiplies_by_what_is_left(training, compiled, monkeypatch):
    """Pruning makes the weight a plain attribute, computed before each call from a parameter of another name."""
    monkeypatch.setattr(cpu, "COMPILED", compiled and cpu.COMPILED)
    torch.manual_seed(0)
    ours, theirs = bn.BatchNorm1d(6), nn.BatchNorm1d(6)
    with torch.no_grad():
        theirs.weight.copy_(torch.rand(6) + 1)
    ours.load_state_dict(theirs.state_dict())
    for layer in (ours, theirs):
        prune.custom_from_mask(layer, "weight", torch.tensor([1.0, 0, 1, 1, 0, 1]))
        layer.train(training)
    x = torch.randn(8, 6)
    torch.testing.assert_close(ours(x), theirs(x))
