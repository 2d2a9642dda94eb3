"""Where a step begins and ends: in loops that do not call model(x), with closures, with several optimizers."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import batchnorm as bn


class Net(nn.Module):
    """Trained by a method of its own, as a LightningModule, an autoencoder's loss(), an encode() are."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))

    def forward(self, x):
        return self.body(x)

    def loss(self, x):
        return self.body(x).square().mean()


def batches(n):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 4, generator=generator) for _ in range(n)]


class Truth:
    """Of each step, what its forward measured and used, and the gradients."""

    def __init__(self, model):
        self._layer = model.body[1]
        self._linear = model.body[0]
        self.rows = []

    def add(self, x):
        slope = self._layer.weight.grad
        self.rows.append(
            {
                "batch_mean": self._linear(x).mean(0).detach().numpy().copy(),
                "gamma": self._layer.weight.detach().numpy().copy(),
                "gamma_grad": slope.numpy().copy(),
                "running_mean": self._layer.running_mean.numpy().copy(),
            }
        )

    def check(self, folder, steps=None):
        run = bn.open_run(folder)
        steps = list(range(len(self.rows))) if steps is None else steps
        assert run.steps.tolist() == steps
        for quantity in self.rows[0]:
            expected = [self.rows[step][quantity] for step in steps]
            # float32 of the same operations; a mean over eight values of another order
            np.testing.assert_allclose(
                run.vectors("body.1", quantity)[1], expected, rtol=1e-6, atol=1e-6, err_msg=quantity
            )
        return run


def step(model, optimizer, x, truth, loss=None):
    optimizer.zero_grad()
    (loss or model.loss)(x).backward()
    truth.add(x)
    optimizer.step()


@pytest.mark.parametrize("ours", [False, True])
@pytest.mark.parametrize("every", [1, 2])
def test_a_training_that_does_not_call_the_model(tmp_path, ours, every):
    model = bn.convert(Net()) if ours else Net()
    optimizer, truth = torch.optim.Adam(model.parameters(), 0.01), Truth(model)
    with bn.watch(model, tmp_path, every=every) as w:
        for k, x in enumerate(batches(5)):
            assert w.step == k
            step(model, optimizer, x, truth)
            w.log(k=k)
            model.eval()
            model.loss(x)
            model.train()
    run = truth.check(tmp_path, list(range(0, 5, every)))
    assert [row["step"] for row in run.scalars()] == [row["k"] for row in run.scalars()] == [0, 1, 2, 3, 4]
    assert set(run.counts("body.1")) == {8}
    assert set(run.forwards("body.1")) == {1}


def test_numbers_logged_within_a_step_belong_to_it(tmp_path):
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with bn.watch(model, tmp_path) as w:
        for k, x in enumerate(batches(3)):
            loss = model.loss(x)
            w.log(k=k)
            loss.backward()
            optimizer.step()
    assert [row["step"] for row in bn.open_run(tmp_path).scalars()] == [0, 1, 2]


def test_steps_of_other_optimizers_are_none(tmp_path):
    model, other = Net(), Net()
    mine, theirs = (torch.optim.SGD(net.parameters(), 0.1) for net in (model, other))
    truth = Truth(model)
    with bn.watch(model, tmp_path):
        for x in batches(3):
            other.loss(x).backward()
            theirs.step()
            step(model, mine, x, truth)
            theirs.step()
    truth.check(tmp_path)


def test_two_optimizers_that_share_the_model_take_one_step_together(tmp_path):
    model = Net()
    first = torch.optim.SGD(model.body[0].parameters(), 0.1)
    second = torch.optim.SGD(model.body[1].parameters(), 0.1)
    truth = Truth(model)
    with bn.watch(model, tmp_path):
        for x in batches(3):
            second.zero_grad()
            model.loss(x).backward()
            truth.add(x)
            first.step()
            second.step()
    truth.check(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("compiled", ["wrapped", "in place"])
def test_compiled_methods(tmp_path, compiled):
    """No hook is called: that the running statistics were written tells that the layers ran."""
    torch._dynamo.reset()
    model = Net()
    loss = torch.compile(model.loss, backend="aot_eager") if compiled == "wrapped" else None
    if loss is None:
        model.body.compile(backend="aot_eager")
    optimizer, truth = torch.optim.SGD(model.parameters(), 0.1), Truth(model)
    with bn.watch(model, tmp_path):
        for x in batches(4):
            step(model, optimizer, x, truth, loss)
            optimizer.zero_grad()
            optimizer.step()  # nothing ran: no step
    run = bn.open_run(tmp_path)
    assert run.steps.tolist() == [0, 1, 2, 3]
    expected = [row["batch_mean"] for row in truth.rows]
    np.testing.assert_allclose(run.vectors("body.1", "batch_mean")[1], expected, atol=40 * 2**-24)


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("calls", [True, False])
@pytest.mark.parametrize("keyword", [True, False])
@pytest.mark.parametrize("ours", [True, False])
def test_a_closure_is_the_step_whose_it_is(tmp_path, given, calls, keyword, ours):
    model = bn.convert(Net()) if ours else Net()
    optimizer, truth = torch.optim.SGD(model.parameters(), 0.1), Truth(model)
    with bn.watch(model, tmp_path, optimizer=optimizer if given else None) as w:
        for k, x in enumerate(batches(4)):

            def closure(x=x):
                optimizer.zero_grad()
                loss = model(x).square().mean() if calls else model.loss(x)
                loss.backward()
                truth.add(x)
                return loss

            assert w.step == k
            loss = optimizer.step(closure=closure) if keyword else optimizer.step(closure)
            assert loss.item() > 0
            w.log(k=k)
    run = truth.check(tmp_path)
    assert set(run.counts("body.1")) == {8}
    assert [row["step"] for row in run.scalars()] == [0, 1, 2, 3]


@pytest.mark.parametrize("given", [True, False])
def test_of_a_closure_that_is_evaluated_often_the_first_time_is_recorded(tmp_path, given):
    """LBFGS: it is the same batch again, at other weights. `forwards` counts them all."""
    model = Net()
    optimizer, calls = torch.optim.LBFGS(model.parameters(), 0.1, max_iter=4), []
    truth = Truth(model)
    with bn.watch(model, tmp_path, optimizer=optimizer if given else None):
        for x in batches(3):
            calls.append(0)

            def closure(x=x):
                optimizer.zero_grad()
                loss = model(x).square().mean()
                loss.backward()
                if not calls[-1]:
                    truth.add(x)
                calls[-1] += 1
                return loss

            optimizer.step(closure)
    run = truth.check(tmp_path)
    assert run.forwards("body.1").tolist() == calls
    assert calls[0] > 1
    assert set(run.counts("body.1")) == {8}


def test_micro_batches_before_a_closure_are_of_its_step(tmp_path):
    """As Lightning accumulates: all but the last closure are called without the optimizer."""
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    whole = []
    with bn.watch(model, tmp_path, optimizer=optimizer):
        for pair in zip(batches(6)[::2], batches(6)[1::2], strict=True):
            whole.append(model.body[0](torch.cat(pair)).mean(0).detach().numpy())
            optimizer.zero_grad()
            model.loss(pair[0]).backward()
            optimizer.step(lambda x=pair[1]: model.loss(x).backward())
    run = bn.open_run(tmp_path)
    np.testing.assert_allclose(run.vectors("body.1", "batch_mean")[1], whole, atol=1e-6)
    assert set(run.forwards("body.1")) == {2}
    assert set(run.counts("body.1")) == {16}


@pytest.mark.parametrize("given", [True, False])
def test_a_closure_that_raises_is_no_step(tmp_path, given):
    model = Net()
    optimizer, truth = torch.optim.SGD(model.parameters(), 0.1), Truth(model)

    def fail():
        raise ZeroDivisionError

    with bn.watch(model, tmp_path, optimizer=optimizer if given else None) as w:
        step(model, optimizer, batches(1)[0], truth)
        with pytest.raises(ZeroDivisionError):
            optimizer.step(fail)
        assert w.step == 1
        step(model, optimizer, batches(2)[1], truth)
    truth.check(tmp_path)


def test_a_wrapper_is_taken_for_the_optimizer_inside(tmp_path):
    class Wrapper:
        def __init__(self, optimizer):
            self.optimizer = optimizer

        def step(self):
            self.optimizer.step()

    model = Net()
    optimizer, truth = Wrapper(torch.optim.SGD(model.parameters(), 0.1)), Truth(model)
    with bn.watch(model, tmp_path, optimizer=optimizer):
        for x in batches(2):
            optimizer.optimizer.zero_grad()
            model.loss(x).backward()
            truth.add(x)
            optimizer.step()
    truth.check(tmp_path)


@pytest.mark.parametrize("given", [True, False])
def test_a_run_without_a_step_says_so(tmp_path, given):
    model, other = Net(), Net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    w = bn.watch(model, tmp_path, optimizer=optimizer if given else None)
    other(batches(1)[0]).sum().backward()
    said = "the optimizer took no step" if given else "Watch the model that is trained, and pass optimizer="
    with pytest.warns(RuntimeWarning, match=rf"no step was recorded in .*: .*{said}"):
        w.close()
    page = bn.report(bn.open_run(tmp_path)).read_text()
    assert "1 BN layer: no step was recorded." in page


def test_the_training_is_the_same_with_a_closure(tmp_path):
    def train(folder):
        model = copy.deepcopy(Net())
        optimizer = torch.optim.LBFGS(model.parameters(), 0.1, max_iter=3)
        w = bn.watch(model, folder) if folder else None
        for x in batches(3):

            def closure(x=x):
                optimizer.zero_grad()
                loss = model.loss(x)
                loss.backward()
                return loss

            optimizer.step(closure)
        if w:
            w.close()
        return model.state_dict()

    bare, watched = train(None), train(tmp_path)
    assert all(torch.equal(bare[name], watched[name]) for name in bare)
