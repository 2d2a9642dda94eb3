"""merge_statistics() and average(): against the statistics of all the data in float64, and within swa_utils."""

import copy

import numpy as np
import pytest
import torch
from compare import assert_close
from sklearn.datasets import load_digits
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import batchnorm as bn

PARTS = [3, 100, 1, 40]


def deep(cls=nn.BatchNorm1d, dtype=torch.float32):
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 5), cls(5), nn.ReLU(), nn.Linear(5, 5), cls(5)).to(dtype)


def snapshot(model):
    return copy.deepcopy(model.state_dict())


def assert_unchanged(models, before):
    for model, state in zip(models, before, strict=True):
        for name, value in model.state_dict().items():
            assert torch.equal(value, state[name])


# merge_statistics


@pytest.mark.parametrize("mean", [0.0, 1e4])
@pytest.mark.parametrize("as_states", [False, True])
def test_merged_are_the_statistics_of_all_the_data(mean, as_states):
    x = torch.randn(sum(PARTS), 3, dtype=torch.float64) * 2 + mean
    x[:50] += 5  # the models have seen different data
    layers = []
    for part in x.split(PARTS):
        layer = nn.BatchNorm1d(3, dtype=torch.float64)
        layer.running_mean.copy_(part.mean(0))
        layer.running_var.copy_(part.var(0) if len(part) > 1 else torch.zeros(3))
        layers.append(layer)
    before = [snapshot(layer) for layer in layers]
    given = [layer.state_dict() for layer in layers] if as_states else iter(layers)
    merged = bn.merge_statistics(given, PARTS)
    # Variances of numbers near 1e4 are had from deviations: what is lost is relative to those and the spread of means.
    assert_close(merged["running_mean"], x.mean(0))
    assert_close(merged["running_var"], x.var(0), ulps=64 + mean)
    assert_unchanged(layers, before)
    whole = nn.BatchNorm1d(3, dtype=torch.float64)
    assert whole.load_state_dict(merged, strict=False).missing_keys == ["weight", "bias"]


@pytest.mark.parametrize("cls", [nn.BatchNorm1d, bn.BatchNorm1d])
def test_shards_merge_to_what_recalibrating_on_all_of_them_gives(cls):
    batches = [torch.randn(n, 4) + n / 20 for n in (8, 30, 12, 50, 9)]
    whole, *shards = (deep(cls) for _ in range(3))
    bn.recalibrate(whole, batches)
    for shard, some in zip(shards, (batches[:2], batches[2:]), strict=True):
        bn.recalibrate(shard, some)
    merged = bn.merge_statistics(shards, [38, 71])
    assert set(merged) == {name for name, _ in whole.named_buffers()}
    for name, value in merged.items():
        if name.endswith("tracked"):
            assert value == 3
        else:
            assert_close(value, whole.get_buffer(name).double(), ulps=8)


def test_keras_convention_and_equal_weights():
    """Biased variances; and without counts the formula as it is written."""
    x = torch.randn(2, 20, 3, dtype=torch.float64) + torch.tensor([0.0, 4.0]).view(2, 1, 1)
    states = [{"a.running_mean": part.mean(0), "a.running_var": part.var(0, correction=0)} for part in x]
    whole = x.flatten(0, 1)
    for merged in (bn.merge_statistics(states, [20, 20], unbiased=False), bn.merge_statistics(states)):
        assert list(merged) == ["a.running_mean", "a.running_var"]
        assert_close(merged["a.running_mean"], whole.mean(0))
        assert_close(merged["a.running_var"], whole.var(0, correction=0), ulps=16)


def test_a_model_without_samples_is_left_out():
    here, there = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    bn.recalibrate(here, [torch.randn(8, 3)])
    there.running_mean.fill_(torch.nan)
    there.running_var.fill_(torch.inf)
    there.num_batches_tracked.fill_(99)
    merged = bn.merge_statistics([there, here], [0, 8])
    for name, value in merged.items():
        assert torch.equal(value, here.get_buffer(name))


def test_dtypes_and_other_layers_that_track():
    model = nn.Sequential(nn.BatchNorm1d(3).to(torch.bfloat16), nn.InstanceNorm1d(3, track_running_stats=True))
    merged = bn.merge_statistics([model, model, nn.Sequential(*copy.deepcopy(model))])
    assert {n: v.dtype for n, v in merged.items()} == {n: b.dtype for n, b in model.named_buffers()}
    with pytest.warns(UserWarning, match="nothing to merge"):
        assert bn.merge_statistics([nn.BatchNorm1d(3, track_running_stats=False), nn.Linear(2, 2)]) == {}


def test_what_cannot_be_merged():
    layer, other = nn.BatchNorm1d(3), nn.BatchNorm1d(4)
    for models, options, said in (
        ([], {}, "at least one model"),
        ([layer, other], {}, r"running_mean must have one shape in all models, but got \[\(3,\), \(4,\)\]"),
        ([layer, nn.Linear(3, 3)], {}, "running_mean are not in all"),
        ([nn.Sequential(layer), nn.Sequential(layer, other)], {}, "1.running_mean are not in all"),
        ([layer.state_dict(), {"running_mean": torch.zeros(3)}], {}, "running_var must have one shape"),
        ([layer] * 2, {"counts": [1]}, "expected 2 counts"),
        ([layer] * 2, {"counts": [0, 0]}, "nor all 0"),
        ([layer] * 2, {"counts": [5, -1]}, "must not be negative"),
        ([layer] * 2, {"counts": [0.5, 0.5]}, "whole numbers"),
        ([layer] * 2, {"counts": [1, 0]}, "sum to at least 2"),
    ):
        with pytest.raises(ValueError, match=said):
            bn.merge_statistics(models, **options)


# average


class Mixed(nn.Module):
    """Entries of every kind."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("positions", torch.arange(4))
        self.register_buffer("seen", torch.tensor(False))
        self.register_buffer("scale", torch.rand(2, dtype=torch.float64))
        self.spectrum = nn.Parameter(torch.randn(2, dtype=torch.complex64))

    def get_extra_state(self):
        return {"note": id(self)}

    def set_extra_state(self, state):
        pass


@pytest.mark.parametrize("weights", [None, [3, 0, 1]])
def test_every_kind_of_entry_is_averaged_as_what_it_is(weights):
    models = [Mixed() for _ in range(3)]
    for i, model in enumerate(models):
        bn.recalibrate(model, [torch.randn(30, 3) + i] * (5 - i), call=lambda model, batch: model.norm(batch))
        model.seen.fill_(i == 2)
    before = [snapshot(model) for model in models]
    said = r"last model's are taken: seen \(torch.bool\), _extra_state \(dict\)$"
    with pytest.warns(UserWarning, match=said):  # "positions" are the same in all
        averaged = bn.average(models, weights)
    assert_unchanged_but_extra = [{k: v for k, v in s.items() if k != "_extra_state"} for s in before]
    for model, state in zip(models, assert_unchanged_but_extra, strict=True):
        assert all(torch.equal(model.state_dict()[k], v) for k, v in state.items())
    shares = torch.tensor(weights or [1, 1, 1], dtype=torch.float64)
    shares = (shares / shares.sum())[:, None]
    for name in ("linear.weight", "norm.weight", "scale"):
        values = torch.stack([s[name].double() for s in before])
        assert_close(averaged[name], (values * shares.view(3, *[1] * (values.dim() - 1))).sum(0))
    means, variances = (torch.stack([s[f"norm.running_{of}"].double() for s in before]) for of in ("mean", "var"))
    mean = (means * shares).sum(0)
    assert_close(averaged["norm.running_mean"], mean)
    assert_close(averaged["norm.running_var"], ((variances + (means - mean).square()) * shares).sum(0))
    assert averaged["norm.num_batches_tracked"] == 5
    assert torch.equal(averaged["positions"], torch.arange(4))
    assert averaged["seen"]
    assert averaged["_extra_state"] == {"note": id(models[2])}
    expected = sum(s["spectrum"].to(torch.complex128) * w for s, w in zip(before, shares.flatten(), strict=True))
    torch.testing.assert_close(averaged["spectrum"], expected.to(torch.complex64))
    target = Mixed()
    target.load_state_dict(averaged)
    assert list(averaged) == list(target.state_dict())
    averaged["positions"].zero_()
    assert models[2].positions.any()  # nothing is shared with the models


def arrays(model, of=lambda array: array):
    """A state as Flower and others send it: arrays, of which some are read-only, strided or scalars."""
    return {name: of(value.numpy().copy()) for name, value in model.state_dict().items()}


def scalars(array):
    return array[()] if array.ndim == 0 else array


def strided(array):
    return np.repeat(array[None], 2, 0)[::-1][0] if array.ndim else array


def foreign(array):
    return array.astype(array.dtype.newbyteorder(">"))


@pytest.mark.parametrize("of", [lambda a: a, scalars, strided, foreign], ids=["plain", "scalars", "strided", "foreign"])
def test_numpys_arrays_are_averaged_and_merged_as_tensors_are(of):
    models = [deep() for _ in range(3)]
    for i, model in enumerate(models):
        model(torch.randn(20, 4) + i)
        model[0].weight.data += i
    states = [arrays(model, of) for model in models]
    before = copy.deepcopy(states)
    for function, given in ((bn.average, [3, 0, 1]), (bn.merge_statistics, [20, 40, 60])):
        expected, found = function(models, given), function(states, given)
        assert list(found) == list(expected)
        for name, value in found.items():
            assert (type(value), value.dtype) == (type(states[0][name]), states[0][name].dtype)
            assert np.array_equal(value, expected[name].numpy())
    assert all(np.array_equal(s[name], b[name]) for s, b in zip(states, before, strict=True) for name in s)
    mixed = bn.average([models[0], *states[1:]])
    assert all(torch.equal(value, mixed[name]) for name, value in bn.average(models).items())


def test_arrays_without_names_say_how_to_name_them():
    for function in (bn.average, bn.merge_statistics):
        with pytest.raises(TypeError, match=r"got list; .* dict\(zip\(model.state_dict\(\), arrays\)\)"):
            function([list(arrays(deep()).values())] * 2)


def test_what_cannot_be_averaged():
    for models, options, said in (
        ([nn.Linear(2, 2), nn.Linear(2, 2, bias=False)], {}, "bias are not in all"),
        (
            [nn.Linear(2, 2), nn.Linear(3, 2)],
            {},
            r"weight must have one shape in all models, but got \[\(2, 2\), \(2, 3\)\]",
        ),
        ([nn.Linear(2, 2)], {"weights": [torch.nan]}, "must not be negative"),
    ):
        with pytest.raises(ValueError, match=said):
            bn.average(models, **options)


def test_averaging_again_and_again_keeps_the_count_of_batches():
    """Rounds of federated learning: the sum of the clients' counts would have left int64 behind after 40 rounds."""
    server, clients = deep(), [deep() for _ in range(3)]
    for _ in range(45):
        for client in clients:
            client.load_state_dict(server.state_dict())
            client(torch.randn(4, 4))
        server.load_state_dict(bn.average(clients))
    assert server[1].num_batches_tracked == 45
    assert server.state_dict()["1.running_var"].isfinite().all()


# Within torch.optim.swa_utils


def digits():
    images, labels = load_digits(return_X_y=True)
    x, target = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
    return x[:1200], target[:1200], x[1200:], target[1200:]


def train(model, x, target, averaged):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    for step in range(60):
        batch = torch.arange(60) + 60 * (step % 20)
        nn.functional.cross_entropy(model(x[batch]), target[batch]).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step >= 20:
            averaged.update_parameters(model)


def accuracy(model, x, target):
    return (model.eval()(x).argmax(1) == target).float().mean().item()


def test_recalibrate_takes_the_place_of_update_bn_after_averaging():
    x, target, unseen, labels = digits()
    model = nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 32), nn.BatchNorm1d(32))
    model.extend([nn.ReLU(), nn.Linear(32, 10)])
    averaged = AveragedModel(model)
    train(model, x, target, averaged)
    batches = list(zip(x.split(500), target.split(500), strict=True))  # of 500, 500, 200
    theirs = copy.deepcopy(averaged)
    update_bn(batches, theirs)
    result = bn.recalibrate(averaged, batches)
    inputs = averaged.module[0](x).detach().double()
    assert_close(averaged.module[1].running_var, inputs.var(0), scale=inputs.square().max().item())
    assert [d.layer for d in result.layers] == ["module.1", "module.4"]
    assert result.layers[0].mean.abs().max() > 0.1  # the last weights' statistics are not the averaged ones'
    assert accuracy(averaged, unseen, labels) > 0.85
    off = (theirs.module[1].running_var.double() - inputs.var(0)).abs().max()
    assert off > 100 * (averaged.module[1].running_var.double() - inputs.var(0)).abs().max()


def test_average_is_what_averaged_model_has_but_for_the_statistics():
    models = [deep() for _ in range(3)]
    for i, model in enumerate(models):
        for _ in range(3):
            model(torch.randn(16, 4) + 3 * i)
        with torch.no_grad():
            for p in model.parameters():
                p.normal_()
    theirs = AveragedModel(models[0], use_buffers=True)
    for model in models:
        theirs.update_parameters(model)
    ours = bn.average(models)
    for name, value in theirs.module.named_parameters():
        torch.testing.assert_close(ours[name], value)
    torch.testing.assert_close(ours["1.running_mean"], theirs.module[1].running_mean)
    means, variances = (
        torch.stack([m[1].get_buffer(f"running_{of}").double() for m in models]) for of in ("mean", "var")
    )
    expected = variances.mean(0) + means.var(0, correction=0)
    assert_close(ours["1.running_var"], expected, scale=expected.max().item())
    assert (theirs.module[1].running_var < 0.9 * expected).any()


@pytest.mark.parametrize("multi_avg_fn", [None, get_ema_multi_avg_fn(0.999)])
def test_averaged_models_buffers_round_the_count_down_until_it_stands_still(multi_avg_fn):
    model = deep()
    theirs = AveragedModel(model, multi_avg_fn=multi_avg_fn, use_buffers=True)
    for _ in range(20):
        model(torch.randn(8, 4))
        theirs.update_parameters(model)
    assert theirs.module[1].num_batches_tracked == 1
    assert bn.average([theirs.module, model])["1.num_batches_tracked"] == 20
