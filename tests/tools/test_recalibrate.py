"""recalibrate(): the statistics of all the data in float64, however it is cut; and what update_bn does instead."""

import copy
import json

import pytest
import ranks
import torch
from compare import assert_close
from leftovers import everything
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import update_bn
from torch.utils.data import TensorDataset

import batchnorm as bn

BOTH = [nn.BatchNorm1d, bn.BatchNorm1d]
ROWS = 203


class Mine(nn.BatchNorm1d):
    """A subclass that computes something else."""

    def forward(self, input):
        return super().forward(input) * 2


def deep(cls=nn.BatchNorm1d, dtype=torch.float64, **options):
    torch.manual_seed(3)
    layers = [module for _ in range(3) for module in (nn.Linear(4, 4), cls(4, **options), nn.Dropout(), nn.Tanh())]
    return nn.Sequential(*layers).to(dtype)


def norms(model):
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def cut(x, *sizes):
    return x.split([*sizes, len(x) - sum(sizes)])


def statistics(model):
    return {n: b.clone() for n, b in model.named_buffers()}


def assert_same(model, before):
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer.nan_to_num(), before[name].nan_to_num()), name


def assert_population(layer, x, scale=1.0):
    """The layer's running statistics are those of x, (N, C, *), in float64 but for one rounding each."""
    values = x.double().movedim(1, -1).flatten(0, -2)
    assert_close(layer.running_mean, values.mean(0), scale=max(1.0, values.abs().max().item()))
    assert_close(layer.running_var, values.var(0), scale=scale)


# What is measured


@pytest.mark.parametrize("sizes", [(), (1, 2, 100), (57, 6)])
@pytest.mark.parametrize("mean", [0.0, 1e4])
@pytest.mark.parametrize(
    ("cls", "shape"),
    [
        *((cls, (ROWS, 3)) for cls in (*BOTH, Mine, nn.SyncBatchNorm)),
        *((cls, (ROWS, 3, 2, 2)) for cls in (nn.BatchNorm2d, bn.BatchNorm2d)),
        (bn.BatchNorm3d, (ROWS, 3, 1, 2, 2)),
    ],
)
def test_statistics_are_those_of_all_the_data_however_it_is_cut(cls, shape, mean, sizes):
    x = torch.randn(shape) + mean
    layer = cls(3)
    bn.recalibrate(layer, cut(x, *sizes))
    assert_population(layer, x, scale=2.0)


@pytest.mark.parametrize("cls", [*BOTH, Mine, nn.SyncBatchNorm])
def test_one_value_alone_is_normalized_by_all_that_was_seen(cls):
    """By the formula, in float64: what the second layer is given, of a last batch of one value a channel."""
    model = nn.Sequential(cls(3), cls(3)).double()
    model[0].running_mean.fill_(torch.nan)  # nothing depends on what was tracked
    x = torch.randn(21, 3, dtype=torch.float64) * 3 + 5
    twice = 2 if cls is Mine else 1
    bn.recalibrate(model, x.split(10))
    by_batch = [(part - part.mean(0)) / (part.var(0, correction=0) + 1e-5).sqrt() for part in x[:20].split(10)]
    last = (x[20:] - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt()
    assert_population(model[0], x, scale=x.var(0).max().item())
    assert_population(model[1], torch.cat([*by_batch, last]) * twice, scale=4.0)


@pytest.mark.parametrize("cls", BOTH)
def test_one_value_at_a_time_is_a_population_as_any(cls):
    model, x = nn.Sequential(cls(3), nn.ReLU(), cls(3)), torch.randn(ROWS, 3) * 3 + 5
    model[0].running_mean.fill_(torch.nan)
    bn.recalibrate(model, x.split(1))
    assert_population(model[0], x, scale=x.var(0).max().item())
    whole = nn.Sequential(cls(3), nn.ReLU(), cls(3))
    bn.recalibrate(whole, [x])
    # The first few are normalized by the few seen so far: a shift of some percent is what it costs the second layer.
    assert (model[2].running_var / whole[2].running_var - 1).abs().max() < 0.2
    assert all(layer.num_batches_tracked == ROWS for layer in norms(model))


def test_the_momentum_the_mode_and_what_was_tracked_before_do_not_matter():
    x = torch.randn(ROWS, 3)
    for layer in (nn.BatchNorm1d(3, momentum=None), nn.BatchNorm1d(3, momentum=1e-3), bn.BatchNorm1d(3).eval()):
        layer.running_mean.fill_(torch.nan)
        layer.num_batches_tracked.fill_(7)
        bn.recalibrate(layer, cut(x, 100))
        assert_population(layer, x, scale=2.0)
        assert layer.num_batches_tracked == 9


def test_options_of_our_layers():
    """The biased variance; masks, lengths and channels in another place; and ghost batches are still one population."""
    x = torch.randn(6, 5, 3)
    lengths = torch.tensor([5, 2, 0, 1, 5, 3])
    valid = x[torch.arange(5) < lengths[:, None]].double()
    layer = bn.BatchNorm1d(3, channel_dim=-1, unbiased=False)
    batches = [{"input": x[a:b], "lengths": lengths[a:b]} for a, b in ((0, 2), (2, 6))]
    result = bn.recalibrate(layer, batches)
    assert_close(layer.running_mean, valid.mean(0))
    assert_close(layer.running_var, valid.var(0, correction=0))
    assert result.layers[0].values == len(valid)
    other = bn.BatchNorm1d(3, virtual_batch_size=4)
    bn.recalibrate(other, [valid.float()])
    assert_population(other, valid.float())


def test_a_shared_layer_measures_all_its_calls():
    shared = nn.BatchNorm1d(3, affine=False)
    x = torch.randn(8, 3) * 3 + 1
    bn.recalibrate(nn.Sequential(shared, shared), [x])
    both = torch.cat([x, nn.functional.batch_norm(x, None, None, training=True)])
    assert_population(shared, both, scale=both.square().max().item())
    assert shared.num_batches_tracked == 2


@pytest.mark.parametrize("cls", BOTH)
def test_one_pass_measures_with_earlier_layers_as_in_training_and_dropout_off(cls):
    """Cumulative averages of equal batches in train mode see the same means; torch's own forward is the peer."""
    model, batches = deep(cls), list(torch.randn(4, 50, 4, dtype=torch.float64))
    peer = copy.deepcopy(model).train()
    for module in peer.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    update_bn(batches, peer)
    bn.recalibrate(model, batches)
    for layer, other in zip(norms(model), norms(peer), strict=True):
        assert_close(layer.running_mean, other.running_mean, ulps=64)


@pytest.mark.parametrize("sizes", [(), (1, 150), (3, 99, 20)])
@pytest.mark.parametrize("train", [False, True])
def test_exact_makes_eval_the_normalization_by_the_whole_population(sizes, train):
    """With the biased variance, eval is train mode on all the data as one batch, in every layer."""
    model = deep(bn.BatchNorm1d, unbiased=False).train(train)
    x = torch.randn(ROWS, 4, dtype=torch.float64) * 3 + 1
    result = bn.recalibrate(model, cut(x, *sizes), exact=True)
    assert result.passes <= 3
    twin = deep(bn.BatchNorm1d).eval()
    for layer in norms(twin):
        layer.train()
    # Each of three layers rescales what the ones before it were rounded to: some tens of ulps.
    assert_close(model.eval()(x), twin(x), ulps=256)


def test_exact_is_the_same_for_torchs_layers_however_the_data_is_cut():
    x = torch.randn(ROWS, 4, dtype=torch.float64)
    found = []
    for sizes in ((), (1, 1, 150)):
        model = deep()
        bn.recalibrate(model, cut(x, *sizes), exact=True)
        found.append(norms(model))
        inputs = x
        for module in model.eval():  # each layer's are those of what it is given in eval
            if isinstance(module, nn.BatchNorm1d):
                assert_close(module.running_mean, inputs.mean(0), ulps=64)
                assert_close(module.running_var, inputs.var(0), ulps=64)
            inputs = module(inputs).detach()
    for one, other in zip(*found, strict=True):
        assert_close(one.running_var, other.running_var, ulps=256)
    bn.recalibrate(model, cut(x, 2, 150))
    with pytest.raises(AssertionError):  # one pass does not give that: the test can fail
        assert_close(found[0][2].running_var, model[9].running_var, ulps=256)


def test_exact_stops_when_nothing_moves_and_wants_batches_that_can_be_repeated():
    model, x = deep(), torch.randn(ROWS, 4, dtype=torch.float64)
    assert bn.recalibrate(model, [x], exact=True).passes == 3
    assert bn.recalibrate(model, [x], exact=True).passes == 2  # the second finds what the first did
    before = statistics(model)
    with pytest.raises(ValueError, match="iterator"):
        bn.recalibrate(model, iter([x]), exact=True)
    assert_same(model, before)


# What it is called with


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, values, labels=None):
        return self.norm(values)


def test_batches_of_every_kind():
    x = torch.randn(8, 3)
    label = torch.zeros(8)
    for batch in (x, (x, label), [x], {"values": x, "labels": label}, ({"values": x}, label)):
        model = Named()
        bn.recalibrate(model, [batch])
        assert_population(model.norm, x, scale=2.0)
    model = Named()
    bn.recalibrate(model, [(label, x)] * 3, call=lambda model, batch: model(batch[1]), max_batches=1)
    assert_population(model.norm, x, scale=2.0)
    assert model.norm.num_batches_tracked == 1


@pytest.mark.slow
def test_a_data_loader_and_a_model_that_has_been_compiled():
    torch._dynamo.reset()
    x = torch.randn(20, 3)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, x), batch_size=8)
    model = nn.Sequential(nn.BatchNorm1d(3), bn.BatchNorm1d(3), nn.Linear(3, 3))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    compiled(x)
    result = bn.recalibrate(compiled, loader)
    assert_population(model[0], x, scale=2.0)
    assert [d.state for d in result.layers] == ["recalibrated"] * 2


def test_what_cannot_be_asked_for():
    model = Named()
    for batches, options, said in (
        ([], {}, "at least one batch"),
        ([torch.randn(4, 3)], {"max_batches": 0}, "max_batches"),
        ([torch.randn(4, 3)], {"only": "nan"}, "only must be"),
    ):
        with pytest.raises(ValueError, match=said):
            bn.recalibrate(model, batches, **options)
    with pytest.raises(ValueError, match="1 has not seen an input"):
        bn.recalibrate(nn.Sequential(nn.BatchNorm1d(3), nn.LazyBatchNorm1d()), [torch.randn(4, 3)])
    with pytest.warns(UserWarning, match="no batch norm to recalibrate; it has Linear") as caught:
        assert bn.recalibrate(nn.Linear(3, 3), []).layers == []
    assert caught[0].filename == __file__


@pytest.mark.parametrize("tool", ["recalibrate", "adapt", "compare_modes", "diagnose"])
def test_one_batch_in_place_of_batches_says_what_to_pass(tool):
    model, given = nn.Sequential(nn.BatchNorm1d(4)), {"loss": lambda y, x: y.mean()} if tool == "compare_modes" else {}
    before = statistics(model)
    for x in (torch.randn(8, 4), torch.randn(4, 4, 5), torch.randn(8, 4).numpy()):  # of the second each row fits too
        with pytest.raises(TypeError, match=r"one (Tensor|ndarray) of \((8, 4|4, 4, 5)\): pass \[x\] if .* x\.split"):
            getattr(bn, tool)(model, x, **given)
    with pytest.raises(TypeError, match=r"one dict with 'input', 'mask': pass \[batch\]"):
        getattr(bn, tool)(model, {"input": torch.randn(8, 4), "mask": None}, **given)
    with pytest.raises(TypeError, match=r"a TensorDataset, whose items are samples: pass DataLoader\(dataset"):
        getattr(bn, tool)(model, TensorDataset(torch.randn(8, 4, 4)), **given)
    assert_same(model, before)


# What stays as it was


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("cls", BOTH)
def test_nothing_else_is_changed(cls, exact):
    model = deep(cls, torch.float32)
    norms(model)[0](torch.randn(8, 4))
    model[1].weight.requires_grad_(False)
    model[2].eval()
    seen = []
    model[5].register_forward_hook(lambda layer, *_: seen.append(layer.training))
    bn.freeze(model[9], stats=False, affine=True)
    before, measured = everything(model), [getattr(layer, "measured", None) for layer in norms(model)]
    bn.recalibrate(model, list(torch.randn(2, 8, 4)), exact=exact)
    assert everything(model) == before
    assert [getattr(layer, "measured", None) for layer in norms(model)] == measured
    assert not any(seen)  # what watches a layer in training sees no step
    assert all(layer.num_batches_tracked for layer in norms(model))


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("cls", BOTH)
@pytest.mark.parametrize("wrong", [torch.randn(4, 5), torch.full((4, 4), torch.nan)])
def test_if_anything_raises_all_is_as_it_was(cls, exact, wrong):
    model = deep(cls, torch.float32)
    model(torch.randn(8, 4))
    before, kept = everything(model), statistics(model)
    with pytest.raises(RuntimeError):
        bn.recalibrate(model, [torch.randn(8, 4), wrong], exact=exact)
    assert everything(model) == before
    assert_same(model, kept)
    if wrong.isnan().any():
        with pytest.raises(RuntimeError, match=r"1 measured NaN or infinite values in 4 of 4 .* as they were"):
            bn.recalibrate(model, [wrong], exact=exact)
    with pytest.raises(RuntimeError, match="only one value per channel"):
        bn.recalibrate(model, [torch.randn(1, 4)], exact=True)
    assert_same(model, kept)


@pytest.mark.parametrize("exact", [False, True])
def test_an_interruption_leaves_all_as_it_was(exact):
    class Interrupted(list):
        passes = 0

        def __iter__(self):
            self.passes += 1
            yield from super().__iter__()
            if self.passes == (2 if exact else 1):
                raise KeyboardInterrupt

    model = deep(bn.BatchNorm1d)
    before, kept = everything(model), statistics(model)
    with pytest.raises(KeyboardInterrupt):
        bn.recalibrate(model, Interrupted([torch.randn(8, 4).double()]), exact=exact)
    assert everything(model) == before
    assert_same(model, kept)


@pytest.mark.parametrize("train", [False, True])
def test_frozen_layers_and_those_that_do_not_track_are_left_alone(train):
    model = nn.Sequential(*(nn.BatchNorm1d(3) for _ in range(4)), nn.BatchNorm1d(3, track_running_stats=False))
    model.append(nn.InstanceNorm1d(3, track_running_stats=True))
    bn.freeze(model[1]).running_mean.fill_(5.0)
    unused = nn.BatchNorm1d(3)
    model[5].unused = unused
    model.train(train)
    model[2].eval()
    before = statistics(model)
    with bn.no_update(model[3]):
        result = bn.recalibrate(model, [torch.randn(8, 3, 4)])
    states = ["recalibrated", "frozen", "in eval mode" if train else "recalibrated", "does not track"]
    assert [d.state for d in result.layers] == [*states, "does not track", "did not run"]
    for drift in result.layers:
        layer = model.get_submodule(drift.layer)
        if drift.state != "recalibrated" and layer.running_mean is not None:
            assert torch.equal(layer.running_mean, before[f"{drift.layer}.running_mean"])
            assert torch.equal(layer.num_batches_tracked, before[f"{drift.layer}.num_batches_tracked"])
    assert torch.equal(model[5].running_mean, before["5.running_mean"])


# Repair


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("cls", BOTH)
def test_after_nan_only_the_channels_that_are_broken_are_set(cls, exact):
    model, x = deep(cls, torch.float32), torch.randn(64, 4)
    model(x)
    first, last = norms(model)[0], norms(model)[2]
    first.running_mean[2], first.running_var[1], last.running_var[0] = torch.nan, torch.inf, -1.0
    before = statistics(model)
    result = bn.recalibrate(model, cut(x, 20), only="nonfinite", exact=exact)
    whole = copy.deepcopy(model)
    whole[1].load_state_dict({k[2:]: v for k, v in before.items() if k.startswith("1.")}, strict=False)
    bn.recalibrate(whole, cut(x, 20), exact=exact)
    assert torch.equal(first.running_mean[1:3], whole[1].running_mean[1:3])
    assert torch.equal(first.running_var[1:3], whole[1].running_var[1:3])
    assert [d.written for d in result.layers] == [2, 0, 1]
    assert [d.nonfinite for d in result.layers] == [2, 0, 1]
    for name, buffer in model.named_buffers():
        kept = torch.ones_like(buffer, dtype=torch.bool)
        if name.startswith("1.running"):
            kept[1:3] = False
        if name.startswith("9.running"):
            kept[0] = False
        assert torch.equal(buffer[kept], before[name][kept]), name
        assert buffer.isfinite().all()


# The table


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_table_says_how_far_off_and_can_be_undone(dtype):
    layer, x = nn.BatchNorm1d(3, eps=0.5, dtype=dtype), torch.randn(ROWS, 3, dtype=dtype) + 4
    layer.running_mean[2] = torch.nan
    before = statistics(layer)
    model = nn.Sequential(layer, bn.freeze(nn.BatchNorm1d(3, dtype=dtype)))
    result = bn.recalibrate(model, cut(x, 100))
    sigma = (x.double().var(0) + 0.5).sqrt()
    expected = -x.double().mean(0) / sigma
    expected[2] = torch.nan
    drift = result.layers[0]
    assert_close(drift.mean.float(), expected)
    assert_close(drift.log_variance.float(), (1.5 / sigma.square()).log())
    said = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    largest = expected[:2].abs().max().item()
    assert said["layers"][0]["mean_drift"]["max"] == pytest.approx(largest)
    assert (said["passes"], said["layers"][0]["values"], said["layers"][0]["nonfinite"]) == (1, ROWS, 1)
    assert said["layers"][1]["mean_drift"] is None
    lines = str(result).splitlines()
    assert [line.split()[0] for line in lines] == ["layer", "0", "1"]
    assert "203" in lines[1]
    assert f"{largest:.3g}" in lines[1]
    assert lines[2].endswith("frozen")
    model.double().to(dtype)  # other buffers than those it was done to
    result.undo()
    assert_same(layer, before)


def test_names_are_shown_as_text():
    model = nn.ModuleDict({"[bold]x[/]": nn.BatchNorm1d(3)})
    assert "[bold]x[/]" in str(bn.recalibrate(model, [0], call=lambda *_: None))


# Several ranks


PARTS = [7, 0, 30, 1]


def recalibrate_on_a_rank(rank, exact):
    x = torch.randn(sum(PARTS), 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mine = x.split(PARTS)[rank]
    model = deep()
    model[1].running_mean.fill_(float(rank))  # ranks that disagree before
    bn.recalibrate(model, [part for part in mine.split(4) if len(part)], exact=exact)
    apart = nn.BatchNorm1d(4)
    if rank == 0:
        bn.recalibrate(apart, [mine.float()], sync=False)  # one rank by itself, and nobody waits
    failing = [mine] if rank != 2 else [mine[:, :2]]
    kept, error = statistics(model), ""
    try:
        bn.recalibrate(model, failing if len(mine) > 1 else [])
    except RuntimeError as raised:
        error = str(raised)
    assert_same(model, kept)
    return statistics(model), error


@pytest.mark.processes
@pytest.mark.parametrize("exact", [False, True])
def test_ranks_with_uneven_batches_have_one_result_and_fail_together(exact):
    found = ranks.run(recalibrate_on_a_rank, 4, exact)
    x = torch.randn(sum(PARTS), 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    batches = [b for part in x.split(PARTS) for b in part.split(4) if len(b)]
    alone = deep()
    bn.recalibrate(alone, batches, exact=exact)
    for states, error in found:
        for name, buffer in states.items():
            assert torch.equal(buffer, found[0][0][name])  # the same bits
            if exact or name.startswith("1."):  # the rank with one value has seen no others to normalize it by
                assert_close(buffer.double(), statistics(alone)[name].double(), ulps=256)
        assert "mat1 and mat2" in error
    assert sum("rank 2 could not measure" in error for _, error in found) == 3


def synchronized_on_a_rank(rank):
    model = bn.convert(deep(), sync=True)
    bn.recalibrate(model, [batch.split([2, 3, 5])[rank] for batch in step_batches()])
    return statistics(model)


def step_batches():
    return list(torch.randn(4, 10, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64))


@pytest.mark.processes
def test_synchronized_layers_count_each_rank_once():
    """What three ranks measure together is what one process measures on the batches that theirs make together."""
    alone = bn.convert(deep())
    bn.recalibrate(alone, step_batches())
    for states in ranks.run(synchronized_on_a_rank, 3):
        for name, buffer in statistics(alone).items():
            if name.endswith("tracked"):
                assert states[name] == 12
            else:
                assert_close(states[name], buffer, ulps=256)


@pytest.mark.usefixtures("group")
def test_of_a_model_in_distributed_data_parallel_the_model_is_called():
    """Its own forward would wait for ranks that have fewer batches."""
    x = torch.randn(8, 3)
    model = DistributedDataParallel(Named())
    model.register_forward_pre_hook(lambda *_: pytest.fail("was called"))
    assert [d.layer for d in bn.recalibrate(model, [x]).layers] == ["norm"]
    assert_population(model.module.norm, x, scale=2.0)


# What others do


def test_update_bn_ignores_the_variance_between_batches():
    batches = torch.tensor([[[-2.95]] * 8, [[2.95]] * 8])
    assert batches.double().flatten().var(correction=0) == pytest.approx(8.7, abs=0.01)
    ours, theirs = nn.BatchNorm1d(1), nn.BatchNorm1d(1)
    update_bn(batches, theirs)
    assert theirs.running_var.item() < 1e-6
    bn.recalibrate(ours, list(batches))
    assert_population(ours, batches.flatten(0, 1), scale=10.0)


def test_update_bn_weights_a_short_batch_like_a_long_one():
    batches = [torch.randn(1000, 1), torch.randn(2, 1) + 100]
    ours, theirs = nn.BatchNorm1d(1), nn.BatchNorm1d(1)
    update_bn(batches, theirs)
    assert 49 < theirs.running_mean.item() < 51
    bn.recalibrate(ours, list(batches))
    assert_population(ours, torch.cat(batches), scale=100.0)
    assert 0.1 < ours.running_mean.item() < 0.3


def test_update_bn_thaws_layers_frozen_by_eval():
    x = torch.randn(64, 3) + 5
    ours, theirs = (nn.Sequential(nn.BatchNorm1d(3).eval(), nn.BatchNorm1d(3)) for _ in range(2))
    before = statistics(ours)
    update_bn([x], theirs)
    assert theirs[0].training
    assert (theirs[0].running_mean > 4).all()
    bn.recalibrate(ours, [x])
    assert not ours[0].training
    assert torch.equal(ours[0].running_mean, before["0.running_mean"])


def test_update_bn_leaves_a_broken_model_if_it_raises():
    batches = [torch.randn(8, 3), torch.randn(8, 2)]
    ours, theirs = (nn.Sequential(nn.BatchNorm1d(3)).eval() for _ in range(2))
    with pytest.raises(RuntimeError):
        update_bn(batches, theirs)
    assert theirs[0].momentum is None
    assert theirs.training
    before, kept = everything(ours), statistics(ours)
    with pytest.raises(RuntimeError):
        bn.recalibrate(ours, list(batches))
    assert (everything(ours), ours[0].momentum) == (before, 0.1)
    assert_same(ours, kept)


def test_update_bn_rejects_dict_batches():
    batches = [{"values": torch.randn(8, 3)}]
    with pytest.raises(AttributeError):
        update_bn(batches, Named())
    bn.recalibrate(Named(), batches)


def test_update_bn_measures_with_dropout_on():
    """The second layer's input has twice the variance that it has in eval."""
    x = torch.randn(4096, 1)
    ours, theirs = (nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(1)) for _ in range(2))
    update_bn([x], theirs)
    assert theirs[1].running_var.item() > 1.8
    bn.recalibrate(ours, [x])
    assert_population(ours[1], x)


def test_the_formula_of_fvcore_loses_a_small_variance_beside_a_large_mean():
    """Its update_bn_stats averages var + mean^2 over the batches in float32, and subtracts the squared mean."""
    batches = torch.randn(20, 256, 1) * 0.1 + 1e3
    means, variances = batches.mean(1), batches.var(1)
    of_squares = (variances + means.square()).mean(0)
    theirs = of_squares - means.mean(0).square()
    assert not 0.005 < theirs.item() < 0.02  # 0.01 is right; where it is negative, eval gives NaN
    ours = nn.BatchNorm1d(1)
    bn.recalibrate(ours, list(batches))
    assert_population(ours, batches.flatten(0, 1), scale=0.01)
