"""watch(): what is recorded when, and that neither the training nor the model notices."""

import copy
import json
import pickle
import threading

import numpy as np
import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.runs import QUANTITIES, list_runs


def build(*layers):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), *(layers or [nn.BatchNorm1d(3)]), nn.Linear(3, 2))


def batches(n, size=8):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, 4, generator=generator) for _ in range(n)]


def step(model, optimizer, x):
    optimizer.zero_grad()
    loss = model(x).square().mean()
    loss.backward()
    optimizer.step()
    return loss


def sgd(model, **options):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, **options)


def values(run, quantity, layer="1"):
    return run.vectors(layer, quantity)[1]


def test_each_quantity_is_of_its_moment(tmp_path):
    """gamma and beta as the forward used them, gradients as the optimizer gets them, running after the forward."""
    model = build()
    layer, optimizer = model[1], sgd(model)
    expected = {quantity: [] for quantity in QUANTITIES[2:]}
    with bn.watch(model, tmp_path, optimizer=optimizer):
        for x in batches(5):
            expected["gamma"].append(layer.weight.detach().clone())
            expected["beta"].append(layer.bias.detach().clone())
            optimizer.zero_grad()
            model(x).square().mean().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.01)
            expected["gamma_grad"].append(layer.weight.grad.clone())
            expected["beta_grad"].append(layer.bias.grad.clone())
            expected["running_mean"].append(layer.running_mean.clone())
            expected["running_var"].append(layer.running_var.clone())
            optimizer.step()
    run = bn.open_run(tmp_path)
    assert run.steps.tolist() == [0, 1, 2, 3, 4]
    for quantity, rows in expected.items():
        np.testing.assert_array_equal(values(run, quantity), torch.stack(rows).numpy(), err_msg=quantity)
        finite = torch.stack(rows).double()
        np.testing.assert_allclose(run.stats("1", quantity)[:, 7], finite.mean(1), rtol=2**-23, atol=1e-30)
        np.testing.assert_allclose(run.stats("1", quantity)[:, 3], finite.median(1).values, rtol=2**-23)
        assert not run.stats("1", quantity)[:, 8].any()


def test_without_an_optimizer_a_step_is_a_forward(tmp_path):
    """Gradients are still read as the optimizer, whichever it is, is about to use them."""
    model = build()
    layer, optimizer = model[1], sgd(model)
    gammas, slopes = [], []
    with bn.watch(model, tmp_path) as w:
        for k, x in enumerate(batches(5)):
            assert w.step == k
            gammas.append(layer.weight.detach().clone())
            optimizer.zero_grad()
            model(x).square().mean().backward()
            slopes.append(layer.weight.grad.clone())
            optimizer.step()
            model.eval()
            model(x)
            model.train()
    run = bn.open_run(tmp_path)
    assert run.steps.tolist() == [0, 1, 2, 3, 4]
    np.testing.assert_array_equal(values(run, "gamma"), torch.stack(gammas).numpy())
    np.testing.assert_array_equal(values(run, "gamma_grad"), torch.stack(slopes).numpy())


def test_without_any_optimizer_gradients_are_read_at_the_next_forward(tmp_path):
    model = build()
    slopes = []
    with bn.watch(model, tmp_path):
        for x in batches(3):
            model(x).square().mean().backward()
            slopes.append(model[1].weight.grad.clone())
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= 0.1 * parameter.grad
    np.testing.assert_array_equal(values(bn.open_run(tmp_path), "gamma_grad"), torch.stack(slopes).numpy())


def test_an_optimizer_of_other_parameters_is_not_taken_for_the_one(tmp_path):
    model, other = build(), build()
    theirs = sgd(other)
    with bn.watch(model, tmp_path):
        (x,) = batches(1)
        loss = model(x).square().mean()
        step(other, theirs, x)
        loss.backward()
        slope = model[1].weight.grad.clone()
    np.testing.assert_array_equal(values(bn.open_run(tmp_path), "gamma_grad"), slope[None].numpy())


@pytest.mark.parametrize("ours", [False, True])
@pytest.mark.parametrize("given", [False, True])
def test_training_computes_the_same_bits(tmp_path, ours, given):
    def train(folder):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.2), nn.Conv2d(4, 5, 3),
            nn.BatchNorm2d(5, momentum=None), nn.BatchNorm2d(5, affine=False), nn.Flatten(), nn.LazyLinear(2),
        )  # fmt: skip
        model(torch.randn(2, 1, 8, 8))
        if ours:
            bn.convert(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        w = bn.watch(model, folder, optimizer=optimizer if given else None) if folder else None
        for k in range(8):
            step(model, optimizer, torch.randn(6, 1, 8, 8))
            if w and k % 3 == 0:
                w.probe([torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(k))])
        if w:
            w.close()
        return model.state_dict(), torch.get_rng_state()

    bare, bare_random = train(None)
    watched, watched_random = train(tmp_path)
    assert torch.equal(bare_random, watched_random)
    for name in bare:
        assert torch.equal(bare[name], watched[name]), name
    assert len(bn.open_run(tmp_path).steps) == 8


def hooks_of(model, optimizer):
    from torch.optim import optimizer as module

    found = [len(d) for m in model.modules() for d in (m._forward_hooks, m._forward_pre_hooks)]
    return found, len(optimizer._optimizer_step_pre_hooks), len(module._global_optimizer_pre_hooks)


@pytest.mark.parametrize("given", [False, True])
def test_close_leaves_no_trace(tmp_path, given):
    model = build()
    optimizer = sgd(model)
    before = hooks_of(model, optimizer)
    threads = threading.active_count()
    w = bn.watch(model, tmp_path, optimizer=optimizer if given else None)
    assert hooks_of(model, optimizer) != before
    step(model, optimizer, batches(1)[0])
    w.close()
    w.close()
    assert hooks_of(model, optimizer) == before
    assert threading.active_count() == threads
    assert bn.open_run(tmp_path).status == "finished"
    step(model, optimizer, batches(1)[0])
    assert bn.open_run(tmp_path).steps.tolist() == [0]
    with pytest.raises(ValueError, match="closed"):
        w.log(loss=1)
    with pytest.raises(ValueError, match="closed"):
        w.probe(batches(1))


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt, "interrupted"), (ZeroDivisionError, "failed")])
def test_an_exception_ends_the_run(tmp_path, error, status):
    model = build()
    optimizer = sgd(model)
    before = hooks_of(model, optimizer)

    def train():
        with bn.watch(model, tmp_path, optimizer=optimizer) as w:
            step(model, optimizer, batches(1)[0])
            w.log(loss=1.0)
            model(batches(1)[0])
            raise error

    with pytest.raises(error):
        train()
    assert hooks_of(model, optimizer) == before
    run = bn.open_run(tmp_path)
    assert (run.status, run.steps.tolist(), run.damage) == (status, [0], [])
    assert run.scalars() == [{"step": 0, "loss": 1.0}]


def test_a_watched_model_is_pickled_and_copied_unwatched(tmp_path):
    model = build()
    optimizer = sgd(model)
    with bn.watch(model, tmp_path / "run", optimizer=optimizer) as w:
        step(model, optimizer, batches(1)[0])
        torch.save(model, tmp_path / "model.pt")
        copies = [
            copy.deepcopy(model),
            pickle.loads(pickle.dumps(model)),
            torch.load(tmp_path / "model.pt", weights_only=False),
        ]
        pickle.dumps(optimizer.state_dict())
        copy.deepcopy(optimizer)
        for other in copies:
            step(other, sgd(other), batches(1)[0])
        assert w.step == 1
        step(model, optimizer, batches(2)[1])
    run = bn.open_run(tmp_path / "run")
    assert run.forwards("1").tolist() == [1, 1]


def test_kinds_of_layers(tmp_path):
    """Frozen, in eval mode, without affine, without tracking, shared, unused: each has what it has, and NaN else."""
    shared = nn.BatchNorm1d(3)
    model = nn.ModuleDict(
        {
            "first": nn.Linear(4, 3),
            "frozen": nn.BatchNorm1d(3).requires_grad_(False),
            "stays": nn.BatchNorm1d(3).eval(),
            "plain": nn.BatchNorm1d(3, affine=False),
            "untracked": nn.BatchNorm1d(3, track_running_stats=False),
            "untracked_eval": nn.BatchNorm1d(3, track_running_stats=False).eval(),
            "shared": shared,
            "again": shared,
            "unused": nn.BatchNorm1d(3),
            "no_bias": bn.BatchNorm1d(3, bias=False),
        }
    )
    optimizer = sgd(model)
    with bn.watch(model, tmp_path, optimizer=optimizer):
        for x in batches(3):
            optimizer.zero_grad()
            for name in model:
                if name != "unused":
                    x = model[name](x)
            x.square().mean().backward()
            optimizer.step()
    run = bn.open_run(tmp_path)
    assert [layer.name for layer in run.layers] == [name for name in model if name not in ("first", "again")]
    learned, slopes, running = {"gamma", "beta"}, {"gamma_grad", "beta_grad"}, {"running_mean", "running_var"}
    batch = {"batch_mean", "batch_var"}
    has = {
        "frozen": batch | learned | running,
        "stays": learned | slopes | running,
        "plain": batch | running,
        "untracked": batch | learned | slopes,
        "untracked_eval": learned | slopes,
        "shared": batch | learned | slopes | running,
        "unused": learned | running,
        "no_bias": batch | {"gamma", "gamma_grad"} | running,
    }
    for name, quantities in has.items():
        for quantity in QUANTITIES:
            exists = quantity in quantities
            assert np.isfinite(run.stats(name, quantity)).all() == exists, (name, quantity)
            assert np.isnan(run.stats(name, quantity)).all() != exists, (name, quantity)
            assert np.isfinite(values(run, quantity, name)).all() == exists, (name, quantity)
        assert set(run.counts(name)) == {0 if "batch_mean" not in quantities else 16 if name == "shared" else 8}, name
        assert set(run.forwards(name)) == {2 if name == "shared" else 1 if "batch_mean" in quantities else 0}, name
    assert run.alerts() == []


def test_nothing_that_is_not_finite_is_dropped(tmp_path):
    model = build()
    optimizer = sgd(model)
    with bn.watch(model, tmp_path, optimizer=optimizer):
        for k, x in enumerate(batches(6)):
            if k == 2:
                with torch.no_grad():
                    model[1].weight[1] = float("inf")
                    model[1].bias[:2] = float("nan")
            if k == 4:
                with torch.no_grad():
                    model[1].bias[2] = float("nan")
            model(x)
            optimizer.step()
    run = bn.open_run(tmp_path)
    assert run.stats("1", "gamma")[:, 8].tolist() == [0, 0, 1, 1, 1, 1]
    assert run.stats("1", "beta")[:, 8].tolist() == [0, 0, 2, 2, 3, 3]
    np.testing.assert_array_equal(run.stats("1", "gamma")[:, :8], np.ones((6, 8)))
    np.testing.assert_array_equal(values(run, "gamma")[3], [1, np.inf, 1])
    assert run.alerts() == [
        {"step": 2, "layer": "1", "quantity": "gamma", "what": "nonfinite", "count": 1},
        {"step": 2, "layer": "1", "quantity": "beta", "what": "nonfinite", "count": 2},
        {"step": 4, "layer": "1", "quantity": "beta", "what": "nonfinite", "count": 3},
    ]


def test_a_poisoned_batch_is_an_alert(tmp_path):
    model = build()
    optimizer = sgd(model)
    with bn.watch(model, tmp_path, optimizer=optimizer):
        for k, x in enumerate(batches(3)):
            model[1](torch.full((8, 3), float("nan")) if k == 1 else model[0](x))
            optimizer.step()
    fired = {(alert["step"], alert["quantity"], alert["count"]) for alert in bn.open_run(tmp_path).alerts()}
    assert fired == {(1, quantity, 3) for quantity in ("batch_mean", "batch_var", "running_mean", "running_var")}


def test_every(tmp_path):
    model = build()
    optimizer = sgd(model)
    with bn.watch(model, tmp_path, optimizer=optimizer, every=3) as w:
        for x in batches(8):
            step(model, optimizer, x)
        assert w.step == 8
    run = bn.open_run(tmp_path)
    assert run.steps.tolist() == [0, 3, 6]
    assert run.forwards("1").tolist() == [1, 1, 1]


def test_vector_budget(tmp_path):
    model = build()
    optimizer = sgd(model)
    with bn.watch(model, tmp_path, optimizer=optimizer, vector_bytes=0):
        step(model, optimizer, batches(1)[0])
    run = bn.open_run(tmp_path)
    assert run.steps.tolist() == [0]
    assert run.vectors("1", "gamma")[0].tolist() == []
    assert run.vectors("1", "gamma")[1].shape == (0, 3)


def test_logged_numbers(tmp_path):
    model = build()
    optimizer = sgd(model)
    with bn.watch(model, tmp_path, optimizer=optimizer) as w:
        w.log(before=1)
        for x in batches(2):
            loss = step(model, optimizer, x)
            w.log(loss=loss, exact=np.float64(0.1), flag=True)
        model.train()(x)
        w.log(under_way=float("nan"), low=-float("inf"))
        with pytest.raises(TypeError, match="one number"):
            w.log(bad=[1])
        with pytest.raises(ValueError, match="step"):
            w.log(step=3)
    rows = bn.open_run(tmp_path).scalars()
    assert [row["step"] for row in rows] == [0, 0, 1, 2]
    assert rows[2] == {"step": 1, "loss": loss.item(), "exact": 0.1, "flag": True}
    assert np.isnan(rows[3]["under_way"])
    assert rows[3]["low"] == -np.inf
    for line in (tmp_path / "scalars.jsonl").read_text().splitlines():  # as strict readers of JSON take it
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_choosing_layers(tmp_path):
    model = nn.ModuleDict({name: nn.BatchNorm1d(3) for name in ("a1", "a2", "b1")})
    for patterns, names in ((None, ["a1", "a2", "b1"]), (["b1", "a1"], ["a1", "b1"]), (["a*"], ["a1", "a2"]), ([], [])):
        folder = tmp_path / str(patterns)
        bn.watch(model, folder, layers=patterns).close("interrupted")
        assert [layer.name for layer in bn.open_run(folder).layers] == names
    with pytest.raises(ValueError, match=r"'c\*'.*a1, a2, b1"):
        bn.watch(model, tmp_path / "none", layers=["a1", "c*"])
    assert not (tmp_path / "none").exists()


def test_scalars_only(tmp_path):
    model = nn.Linear(4, 2)
    with pytest.raises(ValueError, match="layers=\\[\\]"):
        bn.watch(model, tmp_path / "none")
    optimizer = sgd(model)
    with bn.watch(model, tmp_path / "run", optimizer=optimizer, layers=[]) as w:
        w.log(loss=step(model, optimizer, batches(1)[0]))
        w.probe(batches(2))
        assert w.step == 1
    run = bn.open_run(tmp_path / "run")
    assert (len(run.scalars()), len(run.steps), run.layers, run.damage) == (1, 0, [], [])


def test_refusals(tmp_path):
    model = build()
    with pytest.raises(ValueError, match="every"):
        bn.watch(model, tmp_path / "a", every=0)
    with pytest.raises(TypeError, match="optimizer"):
        bn.watch(model, tmp_path / "a", optimizer=object())
    with pytest.raises(ValueError, match="lazy"):
        bn.watch(nn.LazyBatchNorm1d(), tmp_path / "a")
    with pytest.raises(TypeError):
        bn.watch(model, tmp_path / "a", meta={"data": object()})
    with pytest.raises(ValueError, match="log_dir"):
        bn.watch(model, resume_step=3)
    with pytest.raises(FileNotFoundError):
        bn.watch(model, tmp_path / "a", resume_step=3)
    assert list(tmp_path.iterdir()) == []
    assert hooks_of(model, sgd(model)) == hooks_of(build(), sgd(build()))
    bn.watch(model, tmp_path / "a").close("interrupted")
    with pytest.raises(FileExistsError, match="resume_step"):
        bn.watch(model, tmp_path / "a")


def test_lazy_layers_once_they_have_seen_a_batch(tmp_path):
    model = nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d())
    model(batches(1)[0])
    with bn.watch(model, tmp_path):
        model(batches(1)[0])
    assert bn.open_run(tmp_path).layers[0].kind == "BatchNorm1d"


def test_the_default_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recorders = [bn.watch(build()) for _ in range(2)]
    for w in recorders:
        w.close("interrupted")
    assert {run.path for run in list_runs(tmp_path / "runs")} == {w.path for w in recorders}


def test_flush_puts_every_step_taken_on_disk(tmp_path):
    model = build()
    optimizer = sgd(model)
    with bn.watch(model, tmp_path, optimizer=optimizer) as w:
        for k, x in enumerate(batches(5)):
            step(model, optimizer, x)
            w.flush()
            assert bn.open_run(tmp_path).steps.tolist() == list(range(k + 1))


def test_a_full_disk_stops_the_recording_and_not_the_training(tmp_path, monkeypatch):
    from batchnorm.runs.journal import Journal

    def full(self, records):
        raise OSError(28, "No space left on device")

    model = build()
    optimizer = sgd(model)
    w = bn.watch(model, tmp_path, optimizer=optimizer)
    monkeypatch.setattr(Journal, "append", full)
    step(model, optimizer, batches(1)[0])
    with pytest.warns(RuntimeWarning, match="No space left"):
        w.close()
    assert bn.open_run(tmp_path).status == "finished"


def test_what_cannot_be_watched_is_said_before_anything_is_made(tmp_path):
    model, other = nn.BatchNorm1d(3), nn.Linear(3, 3)
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got str"):
        bn.watch("model", tmp_path / "a")
    with pytest.raises(ValueError, match="optimizer must own a parameter of the model, but owns none"):
        bn.watch(model, tmp_path / "a", optimizer=torch.optim.SGD(other.parameters(), lr=0.1))
    (tmp_path / "my.csv").write_text("mine")
    with pytest.raises(FileExistsError, match=r"log_dir must be a folder, but .*my.csv is a file"):
        bn.watch(model, tmp_path / "my.csv")
    assert [path.name for path in tmp_path.iterdir()] == ["my.csv"]


def test_words_are_not_logged(tmp_path):
    with bn.watch(nn.BatchNorm1d(3), tmp_path, layers=[]) as w:
        with pytest.raises(TypeError, match="a logged value must be one number, got str: 'x'"):
            w.log(loss="x")
        w.log(loss=1.0)
    assert bn.open_run(tmp_path).scalars() == [{"step": 0, "loss": 1.0}]
