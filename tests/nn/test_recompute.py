"""Updated once: recomputing() is True in every forward that backward runs, and layers track in no such forward."""

import copy
import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import batchnorm as bn
from batchnorm.nn.recompute import recomputing


class Probe(nn.Module):
    """Passes its input on, and notes whether it was called in a recomputation."""

    def __init__(self):
        super().__init__()
        self.answers = []

    def forward(self, x):
        self.answers.append(recomputing())
        return x.sin()  # something whose input autograd saves


def x():
    return torch.randn(4, requires_grad=True)


def test_a_plain_step_recomputes_nothing():
    probe = Probe()
    probe(x()).sum().backward()
    assert probe.answers == [False]
    assert not recomputing()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpoint_is_recomputed_in_backward(use_reentrant):
    probe = Probe()
    checkpoint(probe, x(), use_reentrant=use_reentrant).sum().backward()
    assert probe.answers == [False, True]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoints_in_checkpoints_and_in_a_row(use_reentrant):
    probe = Probe()
    outer = nn.Sequential(nn.Linear(4, 4), probe, nn.Linear(4, 4))

    def inner(t):
        return checkpoint(outer, t, use_reentrant=use_reentrant) + 0

    checkpoint(inner, x(), use_reentrant=use_reentrant).sum().backward()
    assert probe.answers[0] is False
    assert len(probe.answers) > 1
    assert all(probe.answers[1:])

    probe.answers.clear()
    checkpoint_sequential(outer, 3, x(), use_reentrant=use_reentrant).sum().backward()
    assert probe.answers == [False, True]


def test_a_second_backward_recomputes_too_and_the_forward_between_does_not():
    probe, t = Probe(), x()
    y = checkpoint(probe, t, use_reentrant=False)
    (gradient,) = torch.autograd.grad(y.sum(), t, create_graph=True)
    assert probe.answers == [False, True]
    probe(gradient)  # a gradient penalty: an ordinary forward on a gradient
    assert probe.answers == [False, True, False]
    gradient.square().sum().backward()
    assert all(probe.answers[3:])


def test_a_function_that_runs_the_forward_in_its_backward():
    """What reversible networks and other libraries' checkpointing do."""
    probe = Probe()

    class Reversible(torch.autograd.Function):
        @staticmethod
        def forward(ctx, t):
            ctx.save_for_backward(t)
            return probe(t)

        @staticmethod
        def backward(ctx, grad):
            with torch.enable_grad():
                t = ctx.saved_tensors[0].detach().requires_grad_()
                return torch.autograd.grad(probe(t), t, grad)[0]

    Reversible.apply(x()).sum().backward()
    assert probe.answers == [False, True]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_after_a_backward_that_raises_a_forward_is_a_forward_again(use_reentrant):
    def fail(gradient):
        raise RuntimeError("stop")

    probe, t = Probe(), x()
    t.register_hook(fail)
    with pytest.raises(RuntimeError, match="stop"):
        checkpoint(probe, t * 1, use_reentrant=use_reentrant).sum().backward()
    probe.answers.clear()
    probe(x())
    assert probe.answers == [False]


def test_another_thread_may_go_forward_while_this_one_goes_backward():
    probe, t = Probe(), x()

    def forward_elsewhere(gradient):
        thread = threading.Thread(target=probe, args=(x(),))
        thread.start()
        thread.join()

    t.register_hook(forward_elsewhere)
    t.sin().sum().backward()
    assert probe.answers == [False]


def test_functional_transforms_go_forward_outside_of_a_backward():
    probe = Probe()
    torch.func.grad(lambda t: probe(t).sum())(torch.randn(4))
    torch.func.jvp(probe, (torch.randn(4),), (torch.randn(4),))
    torch.func.hessian(lambda t: probe(t).sum())(torch.randn(4))
    assert not any(probe.answers)


@pytest.mark.slow
def test_it_compiles_to_false():
    @torch.compile(fullgraph=True, backend="eager")
    def f(t):
        return t + 1 if recomputing() else t - 1

    assert f(torch.ones(1)).item() == 0


def net(momentum=0.1):
    return nn.Sequential(
        nn.Conv2d(2, 3, 3),
        bn.BatchNorm2d(3, activation="relu", momentum=momentum),
        nn.Conv2d(3, 3, 3),
        bn.convert(nn.Sequential(nn.BatchNorm2d(3, momentum=momentum), nn.ReLU()), fuse=True),
    )


def assert_same_step(model, plain):
    for (name, a), b in zip(model.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6, msg=name)
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_checkpointed_step_updates_the_statistics_once(use_reentrant, momentum):
    model = net(momentum)
    plain = copy.deepcopy(model)
    for _ in range(2):
        images = torch.randn(4, 2, 8, 8, requires_grad=True)
        plain(images).square().sum().backward()
        checkpoint(model, images, use_reentrant=use_reentrant).square().sum().backward()
    assert model[1].num_batches_tracked == 2
    assert_same_step(model, plain)


@pytest.mark.slow
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpoint_in_a_compiled_step_updates_the_statistics_once(use_reentrant):
    torch._dynamo.reset()
    model = net()
    plain = copy.deepcopy(model)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(images):
        return checkpoint(model, images, use_reentrant=use_reentrant).square().sum()

    for _ in range(2):
        images = torch.randn(4, 2, 8, 8, requires_grad=True)
        plain(images).square().sum().backward()
        step(images).backward()
    assert model[1].num_batches_tracked == 2
    assert_same_step(model, plain)


def test_a_gradient_penalty_tracks_its_one_forward():
    model = nn.Sequential(nn.Linear(4, 3), bn.BatchNorm1d(3), nn.Sigmoid())
    inputs = torch.randn(8, 4, requires_grad=True)
    y = checkpoint(model, inputs, use_reentrant=False)
    (gradient,) = torch.autograd.grad(y.sum(), inputs, create_graph=True)
    gradient.square().sum().backward()
    assert model[1].num_batches_tracked == 1


def test_renorm_refuses_to_be_recomputed():
    """By then its running statistics have moved, and with them r, d and the gradients."""
    y = checkpoint(bn.BatchNorm1d(4, renorm=bn.Renorm()), torch.randn(8, 4, requires_grad=True), use_reentrant=False)
    with pytest.raises(NotImplementedError, match="renormalization"):
        y.sum().backward()


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"virtual_batch_size": 3},
        {"nonfinite": "skip"},
        {"channel_dim": -1},
        {"singleton": "running"},
        {"unbiased": False},
    ],
    ids=str,
)
def test_options_are_recomputed_as_they_were_and_remembered_once(options, use_reentrant):
    layer = bn.BatchNorm1d(4, **options)
    twin = bn.BatchNorm1d(4, **options)
    t, mask = torch.randn(8, 4, requires_grad=True), torch.arange(8) < 6
    y = checkpoint(layer, t, None, mask, use_reentrant=use_reentrant)
    measured = layer.measured
    y.pow(3).sum().backward()
    (expected,) = torch.autograd.grad(twin(t, None, mask).pow(3).sum(), t)
    assert torch.equal(t.grad, expected)
    assert layer.measured is measured
    assert all(torch.equal(a, b) for a, b in zip(layer.buffers(), twin.buffers(), strict=True))

    poisoned = torch.full((8, 4), torch.nan, requires_grad=True)
    checkpoint(layer, poisoned, use_reentrant=use_reentrant).sum().backward()
    assert layer.skipped == (options.get("nonfinite") == "skip")
