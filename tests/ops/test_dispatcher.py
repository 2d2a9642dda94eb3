"""What PyTorch's dispatcher is told of the compiled operators: opcheck, and a package without them."""

import subprocess
import sys

import pytest
import torch
from cases import make, vectors

from batchnorm.ops import cpu, plain

X = make((4, 3, 5, 6))
V = vectors(3)
AFFINE = (V["weight"], V["bias"])
MASK = torch.rand(4, 5, 6, generator=torch.Generator().manual_seed(0)) < 0.5
RELU = (1, 0.0)
STATISTICS = plain.measure(X, None)
EACH = plain.measure(X, MASK, 3)  # of virtual batches of 3 and 1
USUAL = (*AFFINE, 1e-5, *RELU)

CALLS = {
    "forward": (X, *USUAL, X, MASK, 3),
    "forward_": (X, *AFFINE, 1e-5, V["running_mean"], V["running_var"], torch.tensor(3), 0.1, *RELU, X, MASK),
    "infer": (X, V["running_mean"], V["running_var"], *USUAL, X, MASK, True),
    "measure": (X, MASK),
    "normalize": (X, STATISTICS, *USUAL, X, MASK),
    "reduce": (X, X, EACH, *USUAL, None, X, MASK, 3),
    "apply": (X, X, EACH, EACH[:2], *USUAL, None, X, MASK, 3, True, True),
    "backward": (X, X, STATISTICS, *USUAL, None, X, None, 0, True, True, True),
    "update_running_": (V["running_mean"], V["running_var"], STATISTICS, 0.1, True, True),
}


def test_the_operators_are_compiled():
    assert cpu.COMPILED, "the suite has to test the compiled operators; is there a C++ compiler?"


def test_every_operator_is_checked():
    registered = {
        name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("batchnorm::")
    }
    assert registered - {"vector_bytes"} == set(CALLS)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name, layout):
    arguments = [
        a.contiguous(memory_format=layout) if isinstance(a, torch.Tensor) and a.dim() == 4 else a for a in CALLS[name]
    ]
    operator = getattr(torch.ops.batchnorm, name).default
    torch.library.opcheck(operator, tuple(arguments), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.processes
def test_without_compiled_operators_it_warns_once_and_computes_the_same(tmp_path):
    code = """
import warnings, pathlib, torch
real = pathlib.Path.exists
pathlib.Path.exists = lambda self: self.name != "_C.so" and real(self)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import batchnorm as bn
    x = torch.arange(24.0).view(4, 2, 3).requires_grad_()
    for _ in range(2):
        y = bn.batch_norm(x, training=True, activation="relu")
    y.square().sum().backward()
assert len([w for w in caught if "without its compiled operators" in str(w.message)]) == 1, caught
torch.save((y.detach(), x.grad), "%s")
"""
    file = tmp_path / "result.pt"
    subprocess.run([sys.executable, "-c", code % file], check=True)
    y, gradient = torch.load(file, weights_only=True)
    x = torch.arange(24.0, dtype=torch.float64).view(4, 2, 3).requires_grad_()
    exact = torch.nn.functional.batch_norm(x, None, None, training=True).relu()
    exact.square().sum().backward()
    # y is of size 1.5; dx a difference of terms of that size.
    torch.testing.assert_close(y.double(), exact.detach(), rtol=0, atol=1e-6)
    torch.testing.assert_close(gradient.double(), x.grad, rtol=0, atol=1e-6)
