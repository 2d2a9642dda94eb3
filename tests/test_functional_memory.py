"""What a training step holds in memory, beside torch's: what autograd keeps, and the peak of a process."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from cases import laid_out, make

import batchnorm as bn


def torchs(x, residual, weight, bias):
    z = F.batch_norm(x, None, None, weight, bias, training=True)
    return F.relu(z if residual is None else z + residual)


def ours(x, residual, weight, bias):
    return bn.batch_norm(x, None, None, weight, bias, training=True, residual=residual, activation="relu")


def kept(function, *inputs):
    """y, and the bytes of each storage that autograd keeps for backward, by address."""
    storages = {}

    def keep(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = function(*inputs)
    return y, storages


@pytest.mark.kernels  # torch's relu keeps its output
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("with_residual", [True, False])
def test_x_is_kept_and_y_only_beside_a_residual_and_vectors(with_residual, layout, dtype):
    channels = 4
    x = laid_out(make((8, channels, 16, 16), dtype), layout).requires_grad_()
    residual = torch.randn_like(x).requires_grad_() if with_residual else None
    parameters = torch.rand(channels).requires_grad_(), torch.zeros(channels).requires_grad_()
    y, found = kept(ours, x, residual, *parameters)
    large = {x.data_ptr(), y.data_ptr()} if with_residual else {x.data_ptr()}
    statistics = 4 * 8 * channels  # count, mean, m2 and rstd, float64
    assert {address for address, size in found.items() if size > statistics} == large
    _, theirs = kept(torchs, x, residual, *parameters)
    # Beside them torch keeps float32 vectors, we weight and bias too.
    assert sum(found.values()) <= sum(theirs.values()) + statistics + 8 * channels


# Tensors of 64 MiB, which the allocator hands back to the system one by one, so that the peak is what is alive.
PROGRAM = """
import resource, sys
import torch
import torch.nn.functional as F
import batchnorm as bn

torch.set_num_threads(1)

def torchs(x):
    return F.relu(F.batch_norm(x, None, None, weight, bias, training=True))

def ours(x):
    return bn.batch_norm(x, None, None, weight, bias, training=True, activation="relu")

function = {"torchs": torchs, "ours": ours}[sys.argv[1]]

def step(side):
    x = torch.ones(16, 64, side, side).requires_grad_()
    function(function(x)).sum().backward()

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

weight, bias = torch.ones(64, requires_grad=True), torch.zeros(64, requires_grad=True)
step(8)  # what is loaded at the first call is not the step's
before = peak()
step(128)
print((peak() - before) / (4 * 16 * 64 * 128 * 128))
"""


@pytest.mark.processes
def test_the_peak_of_a_step_is_no_higher_than_torchs():
    """In tensors of x's size. Alive at ours' peak: x, y of the first, and y of the second or the first gradient."""
    peaks = {}
    for side in ("torchs", "ours"):
        command = [sys.executable, "-c", PROGRAM, side]
        peaks[side] = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert peaks["ours"] <= peaks["torchs"] + 0.1, peaks
    assert peaks["ours"] <= 3.2, peaks
