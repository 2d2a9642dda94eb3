"""Recording under what training loops wrap around a model: compilation, data parallelism, gradient scaling."""

import copy
import os

import numpy as np
import pytest
import ranks
import torch
from torch import nn

import batchnorm as bn


def build(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 3), nn.BatchNorm1d(3))


def batches(n, size=8):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, 4, generator=generator) for _ in range(n)]


def train(call, optimizer, n=4):
    for x in batches(n):
        optimizer.zero_grad()
        call(x).square().mean().backward()
        optimizer.step()


def record(model, folder, call=None, *, watched=None, given=True):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with bn.watch(watched or model, folder, optimizer=optimizer if given else None) as w:
        train(call or model, optimizer)
        w.probe(batches(3))
    return bn.open_run(folder)


def same(run, other, tolerance):
    assert [layer.name for layer in run.layers] == [layer.name for layer in other.layers]
    assert run.steps.tolist() == other.steps.tolist()
    for layer in run.layers:
        for quantity in ("batch_mean", "batch_var", "gamma", "gamma_grad", "running_var"):
            found, expected = (r.vectors(layer.name, quantity)[1] for r in (run, other))
            np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance, err_msg=quantity)
        for quantity in ("batch_mean", "batch_var"):
            found, expected = (r.probes(layer.name, quantity)[1] for r in (run, other))
            np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("in_place", [True, False])
def test_compiled(tmp_path, given, in_place):
    """Hooks are not called: the batch's moments are had from how the running statistics moved."""
    torch._dynamo.reset()
    model = build()
    eager = record(copy.deepcopy(model), tmp_path / "eager", given=given)
    if in_place:
        model.compile(backend="aot_eager")
        watched = model
    else:
        watched = torch.compile(model, backend="aot_eager")
    run = record(model, tmp_path / "compiled", watched, watched=watched, given=given)
    # The same operations in float32, compiled; inverting multiplies rounding by 1 / momentum = 10.
    same(run, eager, 40 * 2**-24)
    assert set(run.counts("1")) == {8}  # traced into the graph, as the hooks were there before it was compiled
    assert set(run.forwards("1")) == {1}


@pytest.mark.slow
def test_compiled_before_it_is_watched(tmp_path):
    """Then not even the size of the batch is known, and the variance is the unbiased one."""
    torch._dynamo.reset()
    model = build()
    eager = record(copy.deepcopy(model), tmp_path / "eager")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    before = copy.deepcopy(model.state_dict())
    compiled(batches(1)[0]).sum().backward()
    model.load_state_dict(before)
    run = record(model, tmp_path / "compiled", compiled)
    assert set(run.counts("1")) == {-1}
    np.testing.assert_allclose(
        run.vectors("4", "batch_var")[1] * 7 / 8, eager.vectors("4", "batch_var")[1], rtol=40 * 2**-24, atol=1e-6
    )


def test_data_parallel(tmp_path):
    """One process: the wrapper's name and hooks are not in the way, and nothing of the run tells it was there."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = build()
        plain = record(copy.deepcopy(model), tmp_path / "plain")
        wrapped = nn.parallel.DistributedDataParallel(model)
        same(record(wrapped, tmp_path / "wrapped"), plain, 4 * 2**-24)
    finally:
        torch.distributed.destroy_process_group()


def test_other_ranks_record_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with bn.watch(model, tmp_path / "run", optimizer=optimizer) as w:
        train(model, optimizer)
        w.log(loss=1)
        w.probe(batches(2))
    assert (w.step, w.path, (tmp_path / "run").exists()) == (4, None, False)


SCALE = 2.0**12


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("unscales", [False, True])
def test_scaled_gradients_are_recorded_unscaled(tmp_path, fused, unscales):
    """Whether the user unscales, the scaler does within step(), or a fused optimizer does in its kernel."""

    def run(folder, scaler):
        model = build()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=fused)
        with bn.watch(model, folder, optimizer=optimizer):
            for x in batches(4):
                optimizer.zero_grad()
                scaler.scale(model(x).square().mean()).backward()
                if unscales:
                    scaler.unscale_(optimizer)
                scaler.step(optimizer)
                scaler.update()
        return bn.open_run(folder)

    plain = run(tmp_path / "plain", torch.amp.GradScaler("cpu", enabled=False))
    scaled = run(tmp_path / "scaled", torch.amp.GradScaler("cpu", init_scale=SCALE, growth_interval=2))
    for quantity in ("gamma_grad", "beta_grad"):
        # A power of two scales exactly.
        np.testing.assert_array_equal(scaled.vectors("1", quantity)[1], plain.vectors("1", quantity)[1])
        assert np.abs(plain.vectors("1", quantity)[1]).max() > 0


def test_a_step_that_the_scaler_skips_is_no_step(tmp_path):
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    with bn.watch(model, tmp_path, optimizer=optimizer) as w:
        for k, x in enumerate(batches(3)):
            optimizer.zero_grad()
            loss = model(x).square().mean() * (float("inf") if k == 1 else 1)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        assert w.step == 2
    assert bn.open_run(tmp_path).forwards("1").tolist() == [1, 2]


def test_autocast(tmp_path):
    """Inputs in bfloat16, parameters and statistics in float32."""
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = []
    model[0].register_forward_hook(lambda m, a, out: seen.append(out.detach().double().transpose(0, 1).flatten(1)))
    with bn.watch(model, tmp_path, optimizer=optimizer):
        for _ in range(3):
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(torch.randn(4, 2, 6, 6)).float().square().mean()
            loss.backward()
            optimizer.step()
    assert seen[0].dtype == torch.float64
    run = bn.open_run(tmp_path)
    expected = np.array([x.var(1, correction=0).numpy() for x in seen])
    np.testing.assert_allclose(run.vectors("1", "batch_var")[1], expected, rtol=16 * 2**-24)


def test_parametrized_weight(tmp_path):
    model = build()
    nn.utils.parametrizations.weight_norm(model[1], dim=None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with bn.watch(model, tmp_path, optimizer=optimizer):
        gamma = model[1].weight.detach().clone()
        train(model, optimizer)
    run = bn.open_run(tmp_path)
    np.testing.assert_array_equal(run.vectors("1", "gamma")[1][0], gamma.numpy())
    assert np.isnan(run.vectors("1", "gamma_grad")[1]).all()  # what is learned lies behind it
    assert np.isfinite(run.vectors("1", "beta_grad")[1]).all()


def sharded(rank, folder, kind):
    """What watch() says on each rank, and whether the training then runs as it would have."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    model = build()
    if kind == "fully_shard":
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    elif kind == "without the batch norms":
        norms = {p for m in model if isinstance(m, nn.BatchNorm1d) for p in m.parameters()}
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)), ignored_params=norms)
    else:
        model = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=kind == "original")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    try:
        w = bn.watch(model, folder, optimizer=optimizer)
    except ValueError as error:
        w, said = bn.watch(model, folder, optimizer=optimizer, layers=[]), str(error)
    else:
        said = ""
    with w:
        train(model, optimizer)
    return said, w.step


@pytest.mark.processes
@pytest.mark.parametrize("kind", ["fully_shard", "without the batch norms", "original", "flat"])
def test_sharded_layers_are_refused_on_every_rank_at_once(tmp_path, kind):
    found = ranks.run(sharded, 2, str(tmp_path / "run"), kind)
    if kind == "without the batch norms":
        assert found == [("", 4)] * 2
        assert bn.open_run(tmp_path / "run").steps.tolist() == [0, 1, 2, 3]
    else:
        assert found[0] == found[1]
        assert found[0][0].startswith("2 of 2 layers, the first 1, are sharded (FSDP, DTensor)")
        assert found[0][1] == 4
