"""A model called on a batch as loaders make it, and left without a trace."""

import pytest
import torch
from torch import nn

from batchnorm.model.run import call, copied, undisturbed, undisturbed_random_state, unwrapped


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.drop = nn.BatchNorm1d(3), nn.Dropout()

    def forward(self, values, scale=1.0):
        return self.drop(self.norm(values)) * scale


@pytest.mark.parametrize("batch", [
    torch.ones(2, 3), (torch.ones(2, 3), 5), [torch.ones(2, 3)], {"values": torch.ones(2, 3)},
    ({"values": torch.ones(2, 3), "scale": 1.0}, 5),
], ids=["tensor", "tuple", "list", "mapping", "mapping in a tuple"])  # fmt: skip
def test_batches_of_every_kind(batch):
    model = Named().eval()
    assert torch.equal(call(model, batch), model(torch.ones(2, 3)))


def test_tensors_go_to_the_models_device():
    seen = call(nn.Linear(3, 3, device="meta"), {"input": torch.ones(2, 3)})
    assert seen.device.type == "meta"
    assert call(nn.Identity(), torch.ones(2)).device.type == "cpu"  # there is no parameter to follow


@pytest.mark.processes
@pytest.mark.slow
def test_what_is_called_is_neither_compiled_nor_data_parallel():
    model = Named()
    for wrapped in (model, torch.compile(model), nn.DataParallel(torch.compile(model))):
        assert unwrapped(wrapped) is model
    inner = nn.Sequential(torch.compile(model))  # compiled within: a part of the model that calls it
    assert unwrapped(inner) is inner


@pytest.mark.slow
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_no_trace_is_left(fails, compiled):
    torch._dynamo.reset()
    model = Named()
    called = torch.compile(model, backend="eager") if compiled else model
    with torch.no_grad():
        called(torch.randn(4, 3))  # compiled as it will be called, before there is a hook
    model.drop.eval()  # a mode of its own
    y = model(torch.randn(4, 3, requires_grad=True))
    before = {name: (tensor.clone(), tensor._version, tensor.data_ptr()) for name, tensor in model.named_buffers()}
    random = torch.get_rng_state()
    seen = []

    def run():
        with undisturbed(called):
            model.train()
            model.norm.register_forward_hook(lambda *_: seen.append(model.norm.running_mean.clone()))
            assert not called(torch.randn(4, 3) + 5).requires_grad
            if fails:
                raise RuntimeError("as planned")

    if fails:
        with pytest.raises(RuntimeError, match="as planned"):
            run()
    else:
        run()
    assert len(seen) == 1  # compiled code runs eagerly meanwhile, so hooks are called
    assert not torch.equal(seen[0], model.norm.running_mean)  # it was tracked, in a buffer that is gone
    assert torch.equal(torch.get_rng_state(), random)
    assert (model.training, model.norm.training, model.drop.training) == (True, True, False)
    for name, tensor in model.named_buffers():
        values, version, place = before[name]
        assert torch.equal(tensor, values)
        assert (tensor._version, tensor.data_ptr()) == (version, place)
    y.sum().backward()  # under way meanwhile


def test_random_numbers_are_given_back():
    model = nn.Linear(2, 2)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    with undisturbed_random_state(model):
        torch.rand(5)
    assert torch.equal(torch.rand(3), expected)


def test_a_copy_is_the_same_model_in_each_mode():
    class Forgets(Named):
        def __deepcopy__(self, memo):
            twin = Named()
            twin.load_state_dict(self.state_dict())
            return twin

    model = Forgets()
    model.norm.eval()
    twin = copied(model)
    assert (twin.training, twin.norm.training, twin.drop.training) == (True, False, True)
    model.kept = torch.ones(2, requires_grad=True) * 2  # which torch itself does not copy
    assert copied(model).norm.weight is not model.norm.weight


def test_a_copy_that_is_another_model_is_refused():
    class Other(Named):
        def __deepcopy__(self, memo):
            twin = Named()
            nn.init.constant_(twin.norm.weight, 7.0)
            return twin

    with pytest.raises(ValueError, match="a deep copy of Other differs"):
        copied(Other())
