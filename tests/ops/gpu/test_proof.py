"""The proof itself, where it runs on a GPU only: what it computes there is what it says it computes."""

import pytest
import torch
from torch.overrides import TorchFunctionMode

from batchnorm.ops.gpu.implementation import by_plain
from batchnorm.proof import values
from batchnorm.proof.cases import WALKS, Case, laid_out

WAYS = ("whole", "steps", "eval")


@pytest.mark.parametrize(("shape", "layout"), WALKS, ids=str)
def test_tensors_lie_on_the_device_as_the_case_says(shape, layout):
    made = values._make(Case(shape, layout, torch.float32, mask=True), torch.Generator(), "meta")
    assert made.x.stride() == laid_out(torch.empty(shape), layout).stride()
    assert {tensor.device.type for tensor in made if tensor is not None} == {"meta"}


class NothingFromTheCpu(TorchFunctionMode):
    """torch.tensor makes a tensor on the CPU, and copies it to the device: capturing a CUDA graph refuses that."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        assert func not in (torch.tensor, torch.as_tensor, torch.from_numpy)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("way", WAYS)
def test_a_run_can_be_captured_in_a_graph(monkeypatch, way):
    monkeypatch.setattr(values, "by_kernels", lambda name, given: by_plain(name, complete(name, given)))
    case = Case((6, 5, 3), "contiguous", torch.float32, way=way, mask=True, residual=True)
    operands = values.make(case, "cpu")
    with NothingFromTheCpu():
        assert values.run(case, operands)["y"] is not None


def complete(name, given):
    """The arguments of an operator, defaults included."""
    arguments = getattr(torch.ops.batchnorm, name).default._schema.arguments
    return {a.name: given.get(a.name, a.default_value if a.has_default_value() else None) for a in arguments}
