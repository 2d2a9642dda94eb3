"""The same bits whatever the machine: for every number of threads and every instruction set, run after run."""

import os
import subprocess
import sys

import pytest
import torch
from cases import laid_out, make, vectors

from batchnorm import batch_norm
from batchnorm.ops.cpu import COMPILED

pytestmark = pytest.mark.skipif(not COMPILED, reason="installed without a compiler")

# Forward and backward of everything that is cut or computed in another way. Prints the width of the registers in use,
# and one digest of all results for each number of threads.
PROGRAM = """
import hashlib
import torch
import batchnorm.ops.cpu
op = torch.ops.batchnorm
print(op.vector_bytes())

def normal(shape, dtype, layout=torch.contiguous_format):
    x = (torch.randn(shape, dtype=torch.float64) * 2 + 1).to(dtype)  # drawn alike for every capability
    return x.contiguous(memory_format=layout) if x.dim() == 4 else x

def results(x, dy, residual, code, mask):
    weight, bias = (normal(x.shape[1:2], torch.promote_types(x.dtype, torch.float32)) for _ in range(2))
    y, statistics = op.forward(x, weight, bias, 1e-5, code, 0.3, residual)
    kept = (weight, bias, 1e-5, code, 0.3, residual, None)
    return [
        y, statistics, *op.backward(dy, x, statistics, *kept, need_dresidual=True),
        op.measure(x, mask), op.normalize(x, statistics, *kept[:-1], mask),
        op.reduce(dy, x, statistics, *kept, mask),
        *op.forward(x, *kept[:-1], mask, 5),
    ]

def everything():
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        for shape in [(6, 20, 33, 21), (2, 2, 150, 150), (40, 70, 7, 7), (4001, 37), (300, 700)]:
            for layout in (torch.contiguous_format, torch.channels_last):
                x, dy, residual = (normal(shape, dtype, layout) for _ in range(3))
                mask = normal((shape[0], *shape[2:]), torch.float64) > 0
                yield from results(x, dy, None, 1, mask)
                yield from results(x, dy, residual, 0, mask)
    for shape in [(32, 60, 56, 42), (128, 203, 13, 13)]:  # normalized tile by tile
        yield from results(*(normal(shape, torch.float32) for _ in range(3)), 1, None)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for code in range(11):
            yield from results(normal((8, 9, 17, 5), dtype), normal((8, 9, 17, 5), dtype), None, code, None)

for threads in (1, 1, 2, 3, 4, 7):
    torch.set_num_threads(threads)
    digest = hashlib.sha256()
    for t in everything():
        digest.update(t.contiguous().view(torch.uint8).numpy().tobytes())
    print(digest.hexdigest())
"""


@pytest.fixture(scope="module")
def runs():
    """For each capability: the width of the registers, and the digests."""
    found = {}
    for tier in ("default", "avx2", "avx512"):
        command = [sys.executable, "-c", PROGRAM]
        environment = {**os.environ, "ATEN_CPU_CAPABILITY": tier}
        width, *digests = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=True
        ).stdout.split()
        found[tier] = int(width), digests
    return found


@pytest.mark.processes
def test_run_after_run_and_for_any_number_of_threads(runs):
    for _, digests in runs.values():
        assert len(digests) == 6
        assert set(digests) == {digests[0]}


@pytest.mark.processes
def test_for_every_instruction_set(runs):
    assert len({digests[0] for _, digests in runs.values()}) == 1


@pytest.mark.processes
def test_the_capability_chooses_the_loops(runs):
    """Else the test above would compare one instruction set with itself."""
    widths = [width for width, _ in runs.values()]
    machine = torch.backends.cpu.get_cpu_capability()
    assert widths[0] == 16
    assert widths[1] == (32 if machine in ("AVX2", "AVX512") else 16)
    assert widths[2] == (64 if machine == "AVX512" else widths[1])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", [(6, 20, 33, 21), (40, 70, 7, 7), (400, 37)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "expanded"])
def test_deterministic_algorithms_change_nothing(layout, shape, masked):
    """torch then refuses what is not deterministic, and fills what is not initialized with NaN."""
    x, dy, residual = laid_out(make(shape), layout), make(shape), laid_out(make(shape), layout)
    v, mask = vectors(shape[1]), torch.rand(shape[0], *shape[2:]) < 0.5 if masked else None

    def everything():
        statistics = [v[k].clone() for k in ("running_mean", "running_var")]
        leaves = [t.detach().requires_grad_() for t in (x, v["weight"], v["bias"], residual)]
        options = {"residual": leaves[3], "activation": "silu", "mask": mask}
        y = batch_norm(leaves[0], *statistics, *leaves[1:3], training=True, **options)
        gradients = torch.autograd.grad(y, leaves, dy)
        y_eval = batch_norm(leaves[0], *statistics, *leaves[1:3], **options)
        return [y, *gradients, *statistics, y_eval, *torch.autograd.grad(y_eval, leaves, dy)]

    free = everything()
    torch.use_deterministic_algorithms(True)
    try:
        bound = everything()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(free, bound, strict=True))
