"""no_update() and accumulate(): running statistics against those of one batch in float64, for torch.nn's and ours."""

import copy
import pickle
import threading

import pytest
import torch
from compare import assert_close
from lookalikes import FrozenBatchNorm2d
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.checkpoint import checkpoint

import batchnorm as bn

SHAPES = {1: (6, 3), 2: (4, 3, 5, 6), 3: (2, 3, 3, 4, 5)}
LAYERS = [
    *((cls, SHAPES[1]) for cls in (nn.BatchNorm1d, bn.BatchNorm1d, nn.SyncBatchNorm)),
    *((cls, SHAPES[2]) for cls in (nn.BatchNorm2d, bn.BatchNorm2d)),
    *((cls, SHAPES[3]) for cls in (nn.BatchNorm3d, bn.BatchNorm3d)),
]
BOTH = [nn.BatchNorm1d, bn.BatchNorm1d]


class Mine(nn.BatchNorm1d):
    """A subclass that computes something else."""

    def forward(self, input):
        return super().forward(input) + 1


def state(model):
    return copy.deepcopy(model.state_dict())


def assert_same_state(model, before):
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def attributes(model):
    return [(type(m), sorted(set(m.__dict__) - {"_batchnorm_measured"}), repr(m)) for m in model.modules()]


def tracked_at_once(layer, batches):
    """The layer in float64, having tracked all the batches as the one they are together."""
    exact = copy.deepcopy(layer).double()
    exact(torch.cat(batches).double())
    return exact


def assert_tracked_like(layer, exact, batches):
    scale = torch.cat(batches).double().square().max().item()
    for name in ("running_mean", "running_var"):
        assert_close(getattr(layer, name), getattr(exact, name), scale=scale)
    assert torch.equal(layer.num_batches_tracked, exact.num_batches_tracked)


# no_update


@pytest.mark.parametrize(("cls", "shape"), LAYERS)
def test_without_updates_the_output_and_gradients_are_those_of_training(cls, shape):
    layer = cls(3)
    layer(torch.randn(shape))
    twin, x = copy.deepcopy(layer), torch.randn(shape)
    before = state(layer)
    with bn.no_update(layer):
        y = layer(x)
    assert_same_state(layer, before)
    expected = twin(x)
    assert torch.equal(y, expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    assert torch.equal(layer.weight.grad, twin.weight.grad)
    layer(x)
    assert_same_state(layer, twin.state_dict())  # tracks again, and lost nothing


@pytest.mark.parametrize("cls", BOTH)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_eval_inside_uses_the_running_statistics(cls, momentum):
    layer = cls(3, momentum=momentum)
    layer(torch.randn(SHAPES[1]) + 3)
    x = torch.randn(SHAPES[1])
    expected = layer.eval()(x)
    with bn.no_update(layer.train()):
        layer(x)
        assert torch.equal(layer.eval()(x), expected)


def test_blocks_nest_and_end_when_something_raises():
    model = nn.Sequential(nn.BatchNorm1d(3), bn.BatchNorm1d(3), nn.BatchNorm1d(3, track_running_stats=False))
    before = attributes(model)

    def run():
        with bn.no_update(model):
            with bn.no_update(model[0]):
                model(torch.randn(SHAPES[1]))
            model(torch.randn(SHAPES[1]))
            raise KeyError

    with pytest.raises(KeyError):
        run()
    assert not any(layer.num_batches_tracked for layer in model[:2])
    assert attributes(model) == before


@pytest.mark.parametrize("closed_first", [0, 1])
def test_overlapping_blocks_end_with_the_last(closed_first):
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3, track_running_stats=False), bn.BatchNorm1d(3))
    before, looks = state(model), attributes(model)
    blocks = [bn.no_update(model), bn.no_update(model[:2])]
    for block in blocks:
        block.__enter__()
    blocks[closed_first].__exit__(None, None, None)
    model[:2](torch.randn(SHAPES[1]))
    assert_same_state(model, before)
    blocks[1 - closed_first].__exit__(None, None, None)
    assert attributes(model) == looks
    model(torch.randn(SHAPES[1]))
    assert [layer.num_batches_tracked for layer in model] == [1, None, 1]


def test_blocks_of_several_threads_overlap():
    layer = nn.BatchNorm1d(3)
    opened, closed = threading.Barrier(2), threading.Event()

    def first():
        with bn.no_update(layer):
            opened.wait()
        closed.set()

    thread = threading.Thread(target=first)
    thread.start()
    with bn.no_update(layer):
        opened.wait()
        closed.wait()
        layer(torch.randn(SHAPES[1]))
    thread.join()
    assert (layer.num_batches_tracked, layer.track_running_stats) == (0, True)


def test_a_block_that_pools_outlives_one_without_updates():
    layer, batches = nn.BatchNorm1d(3), [torch.randn(SHAPES[1]) for _ in range(2)]
    exact = tracked_at_once(layer, batches)
    without, pooled = bn.no_update(layer), bn.accumulate(layer)
    without.__enter__()
    pooled.__enter__()
    layer(batches[0] + 9)
    without.__exit__(None, None, None)
    for x in batches:
        layer(x)
    pooled.__exit__(None, None, None)
    assert_tracked_like(layer, exact, batches)


def test_another_threads_model_is_updated_meanwhile():
    mine, theirs = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    with bn.no_update(mine):
        thread = threading.Thread(target=theirs, args=(torch.randn(SHAPES[1]),))
        thread.start()
        thread.join()
    assert theirs.num_batches_tracked == 1


def test_frozen_layers_and_other_normalizations_are_left_alone():
    other = nn.InstanceNorm1d(3, track_running_stats=True)
    model = nn.Sequential(bn.freeze(nn.BatchNorm1d(3)), other)
    before = attributes(model)
    for block in (bn.no_update, bn.accumulate):
        with block(model):
            other(torch.randn(2, 3, 4))
            model[0](torch.randn(SHAPES[1]))
        assert attributes(model) == before
    assert other.running_mean.all()
    assert model[0].num_batches_tracked == 0


@pytest.mark.parametrize("block", [bn.no_update, bn.accumulate])
def test_a_lazy_layer_wants_an_input_first(block):
    model = nn.Sequential(nn.BatchNorm1d(3), nn.LazyBatchNorm1d())
    before = [(type(m), m.track_running_stats) for m in model]
    with pytest.raises(ValueError, match="run one batch"), block(model):
        pass
    assert [(type(m), m.track_running_stats) for m in model] == before


@pytest.mark.slow
@pytest.mark.parametrize("cls", BOTH)
@pytest.mark.parametrize("block", [bn.no_update, bn.accumulate])
def test_a_compiled_model_is_compiled_once_for_inside_and_once_for_outside(cls, block):
    if block is bn.accumulate and cls is nn.BatchNorm1d and torch.__version__ < "2.12":
        pytest.skip("torch.compile does not see that the layer pools: docs/layers.md")
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model = cls(3)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    batches = [torch.randn(SHAPES[1]) for _ in range(2)]
    for _ in range(3):
        compiled(batches[0])
        exact, before = copy.deepcopy(model).double(), state(model)
        exact(torch.cat(batches).double())
        with block(model):
            for x in batches:
                compiled(x)
            assert_same_state(model, before)
        if block is bn.accumulate:
            assert_tracked_like(model, exact, batches)
        else:
            assert_same_state(model, before)
    assert len(graphs) <= 3  # outside, inside before anything was pooled, inside after


@pytest.mark.parametrize("cls", BOTH)
def test_the_second_forward_of_sam_does_not_count(cls):
    """Sharpness-aware minimization on digits: statistics as if the perturbed forward had not been."""
    images, labels = load_digits(return_X_y=True)
    x, target = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
    model = nn.Sequential(nn.Linear(64, 20), cls(20), nn.ReLU(), nn.Linear(20, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    expected = None
    for i in range(4):
        batch = slice(50 * i, 50 * i + 50)
        twin = copy.deepcopy(model)
        twin(x[batch])
        expected = twin[1].state_dict()
        nn.functional.cross_entropy(model(x[batch]), target[batch]).backward()
        ascent = [0.05 * p.grad.sign() for p in model.parameters()]
        with torch.no_grad():
            torch._foreach_add_(list(model.parameters()), ascent)
        optimizer.zero_grad()
        with bn.no_update(model):
            nn.functional.cross_entropy(model(x[batch]), target[batch]).backward()
        with torch.no_grad():
            torch._foreach_sub_(list(model.parameters()), ascent)
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            assert torch.equal(getattr(model[1], name), expected[name])
        optimizer.step()


# accumulate


@pytest.mark.parametrize(("cls", "shape"), LAYERS)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_micro_batches_are_tracked_as_the_one_batch_they_are_together(cls, shape, momentum):
    layer = cls(3, momentum=momentum)
    for _ in range(3):
        layer(torch.randn(shape))
    # Of unequal size and with means apart: averages of averages, or of variances, would be far off.
    batches = [torch.randn(rows, *shape[1:]) * 2 + mean for rows, mean in ((2, 5.0), (7, -5.0), (3, 1.0))]
    exact, plain, before = tracked_at_once(layer, batches), copy.deepcopy(layer), state(layer)
    with bn.accumulate(layer):
        outputs = [layer(x) for x in batches]
        assert_same_state(layer, before)
    assert_tracked_like(layer, exact, batches)
    for y, x in zip(outputs, batches, strict=True):
        assert torch.equal(y, plain(x))  # normalized by micro-batch


@pytest.mark.parametrize("cls", [*BOTH, Mine])
@pytest.mark.parametrize("rows", [(5, 1), (1, 5), (1, 1, 1)], ids=str)
def test_a_micro_batch_of_one_counts_and_is_normalized_by_the_pool(cls, rows):
    """By the formula, in float64: by all pooled so far, itself included; the very first by the running statistics."""
    layer = cls(3).double()
    layer.running_mean.fill_(5.0)
    batches = [torch.randn(n, 3, dtype=torch.float64) * 2 + 5 for n in rows]
    exact = tracked_at_once(layer, batches)
    with bn.accumulate(layer):
        for i, x in enumerate(batches):
            seen = torch.cat(batches[: i + 1]) if len(x) == 1 else x
            mean, var = seen.mean(0), seen.var(0, correction=0)
            if len(seen) == 1:
                mean, var = torch.tensor([[5.0], [1.0]], dtype=torch.float64)
            y = layer(x.requires_grad_())
            assert_close(y, (x - mean) / (var + 1e-5).sqrt() + (cls is Mine), ulps=64)
            (gradient,) = torch.autograd.grad(y.sum(), x)
            if len(x) == 1:  # the others are constants to it
                assert_close(gradient, (1 / (var + 1e-5).sqrt()).expand(1, 3), ulps=64)
    assert_tracked_like(layer, exact, batches)
    assert layer.training


@pytest.mark.parametrize("cls", BOTH)
def test_one_value_in_all_has_no_variance_to_track(cls):
    model = nn.Sequential(cls(3), cls(3))
    before = state(model)
    with (
        pytest.raises(ValueError, match=r"^0: Expected more than 1 value .* nothing was tracked"),
        bn.accumulate(model),
    ):
        model(torch.randn(1, 3))
    assert_same_state(model, before)
    patient = bn.BatchNorm1d(3, singleton="running")
    with bn.accumulate(patient):
        patient(torch.randn(1, 3))
    assert patient.num_batches_tracked == 0


def test_masks_count_in_the_pool():
    layer = bn.BatchNorm1d(3, momentum=1.0)
    x, mask = torch.randn(8, 3, 5) * 3, torch.rand(8, 5) < 0.5
    x[~mask[:, None].expand_as(x)] = torch.nan
    with bn.accumulate(layer):
        layer(x[:3], mask=mask[:3])
        layer(x[3:], None, mask[3:])
    valid = x.movedim(1, -1)[mask].double()
    assert_close(layer.running_mean, valid.mean(0), scale=10.0)
    assert_close(layer.running_var, valid.var(0), scale=100.0)


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("options", [{"channel_dim": -1}, {"virtual_batch_size": 3}, {"unbiased": False}], ids=str)
def test_our_layers_pool_what_they_measured_themselves(options, compiled):
    layer = bn.BatchNorm1d(3, momentum=1.0, **options)
    run = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer
    x = torch.randn(8, 5, 3) * 2 + 1
    with bn.accumulate(layer):
        for part in (x[:3], x[3:]):
            run(part if "channel_dim" in options else part.movedim(-1, 1))
    values = x.flatten(0, 1).double()
    assert_close(layer.running_mean, values.mean(0), scale=10.0)
    assert_close(layer.running_var, values.var(0, correction=int(options.get("unbiased", True))), scale=100.0)


def test_what_is_not_finite_is_skipped_or_raised_at_the_end_as_in_one_batch():
    x = torch.randn(6, 3)
    x[0, 1] = torch.inf
    layer = bn.BatchNorm1d(3, nonfinite="skip")
    with bn.accumulate(layer):
        layer(x[:3])
        layer(x[3:])
    assert layer.running_mean.isfinite().all()
    assert (layer.skipped, layer.running_mean[1]) == (1, 0)
    layer = bn.BatchNorm1d(3, nonfinite="raise")
    before = state(layer)
    with pytest.raises(RuntimeError, match="NaN or infinite"), bn.accumulate(layer):
        layer(x)
    assert_same_state(layer, before)


@pytest.mark.parametrize("cls", BOTH)
def test_a_block_that_raises_tracks_nothing(cls):
    model = nn.Sequential(cls(3), cls(3))
    before, looks = state(model), attributes(model)

    def run(*shapes):
        with bn.accumulate(model):
            for shape in shapes:
                model(torch.randn(shape))

    for wrong, error in (((4, 2), RuntimeError), ((4,), ValueError)):
        with pytest.raises(error):
            run(SHAPES[1], wrong)
        assert_same_state(model, before)
        assert attributes(model) == looks
    run(SHAPES[1])
    assert all(layer.num_batches_tracked == 1 for layer in model)


@pytest.mark.parametrize("cls", [*BOTH, Mine])
def test_a_forward_that_failed_is_as_if_it_had_not_been(cls):
    layer = cls(3)
    batches = [torch.randn(SHAPES[1]) for _ in range(2)]
    exact = tracked_at_once(layer, batches)
    with bn.accumulate(layer):
        layer(batches[0])
        with pytest.raises((RuntimeError, ValueError)):
            layer(torch.randn(1, 2))
        layer(batches[1])
    assert_tracked_like(layer, exact, batches)


@pytest.mark.parametrize("cls", BOTH)
def test_what_did_not_run_or_ran_in_eval_or_without_update_is_left_alone(cls):
    model = nn.ModuleList(cls(3) for _ in range(4))
    x, before = torch.randn(SHAPES[1]), state(model)
    with bn.accumulate(model):
        model[0].eval()(x)
        with bn.no_update(model):
            model[1](x)
            model[2](x)
        model[2](x + 1)
    exact = tracked_at_once(cls(3), [x + 1])
    assert_tracked_like(model[2], exact, [x + 1])
    del model[2], before["2.running_mean"], before["2.running_var"]
    assert not any(layer.num_batches_tracked for layer in model)


@pytest.mark.parametrize("cls", BOTH)
def test_of_nested_blocks_the_outermost_counts(cls):
    layer = cls(3)
    batches = [torch.randn(SHAPES[1]) for _ in range(3)]
    exact, before = tracked_at_once(layer, batches), state(layer)
    with bn.accumulate(layer):
        layer(batches[0])
        with bn.accumulate(nn.Sequential(layer)):
            layer(batches[1])
        layer(batches[2])
        assert_same_state(layer, before)
    assert_tracked_like(layer, exact, batches)
    before = state(layer)
    with bn.no_update(layer), bn.accumulate(layer):
        layer(batches[0])
    assert_same_state(layer, before)


@pytest.mark.parametrize("cls", BOTH)
def test_freezing_and_copying_inside_a_block(cls):
    model = nn.Sequential(cls(3), cls(3))
    x = torch.randn(SHAPES[1])
    with bn.accumulate(model):
        model(x)
        copied, loaded = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        bn.freeze(model[1])
    assert (model[1].num_batches_tracked, model[1].training) == (1, False)  # what it measured before still counts
    assert type(bn.unfreeze(model)[1]) is type(model[0]) is cls
    for other in (copied, loaded):
        assert attributes(other) == attributes(model)
        other(x)
        assert other[0].num_batches_tracked == 1


def test_a_shared_layer_pools_all_its_calls():
    shared = nn.BatchNorm1d(3)
    x = torch.randn(SHAPES[1])
    exact = tracked_at_once(shared, [x, x * 2])
    model = nn.Sequential(shared, nn.Identity(), shared)
    with bn.accumulate(model):
        shared(x)
        shared(x * 2)
    assert_tracked_like(shared, exact, [x, x * 2])


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpoint_inside_a_block_counts_once(use_reentrant):
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Sigmoid())
    batches = [torch.randn(SHAPES[1], requires_grad=True) for _ in range(3)]
    with torch.no_grad():
        exact = tracked_at_once(model[1], [model[0](x) for x in batches])
    with bn.accumulate(model):
        for x in batches:
            checkpoint(model, x, use_reentrant=use_reentrant).sum().backward()
    assert_tracked_like(model[1], exact, [model[0](x).detach() for x in batches])


def test_a_transform_inside_a_block_is_refused():
    layer = nn.BatchNorm1d(3)
    with pytest.raises(NotImplementedError, match=r"torch\.func"), bn.accumulate(layer):
        torch.func.grad(lambda x: layer(x).sum())(torch.randn(SHAPES[1]))
    assert layer.num_batches_tracked == 0


def test_training_by_micro_batches_on_digits():
    """After steps of four micro-batches each, every layer has tracked what it measured, pooled by step."""
    images, labels = load_digits(return_X_y=True)
    x, target = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
    model = nn.Sequential(nn.Linear(64, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, 20), bn.BatchNorm1d(20))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    exact, seen = [copy.deepcopy(layer).double() for layer in (model[1], model[4])], []
    for layer in (model[1], model[4]):
        layer.register_forward_pre_hook(lambda module, args: seen.append((module, args[0].detach())))
    for step in range(3):
        with bn.accumulate(model):
            for i in range(4):
                batch = slice(100 * step + 25 * i, 100 * step + 25 * i + 25)
                nn.functional.cross_entropy(model(x[batch]), target[batch]).backward()
        optimizer.step()
        optimizer.zero_grad()
        for layer, twin in zip((model[1], model[4]), exact, strict=True):
            twin(torch.cat([t for module, t in seen if module is layer]).double())
            assert_tracked_like(layer, twin, [t for _, t in seen])
        seen.clear()


@pytest.mark.parametrize("block", [bn.no_update, bn.accumulate])
def test_what_is_no_module_raises(block):
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module.*got NoneType"), block(None):
        pass


@pytest.mark.parametrize("block", [bn.no_update, bn.accumulate])
def test_a_model_without_batch_norm_is_left_alone_and_named(block):
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    with pytest.warns(UserWarning, match="no batch norm to update; it has Linear, ReLU") as caught, block(model):
        model(torch.randn(4, 3))
    assert [each.filename for each in caught] == [__file__]


@pytest.mark.parametrize("block", [bn.no_update, bn.accumulate])
def test_lookalikes_have_nothing_to_update(block):
    model = nn.Sequential(FrozenBatchNorm2d(3), nn.BatchNorm2d(3))
    x = torch.randn(4, 3, 2, 2)
    with block(model):
        model(x)
    assert model[1].num_batches_tracked == (0 if block is bn.no_update else 1)
    assert torch.equal(model[0].running_mean, torch.zeros(3))
