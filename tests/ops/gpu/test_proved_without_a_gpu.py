"""The kernels by Triton's interpreter, and what compilers make of them: each in a process of its own.

Whether Triton interprets is decided where a kernel is decorated, so that both cannot be had in one process.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import batchnorm

ROOT = Path(__file__).parents[3]
SOURCE = str(Path(batchnorm.__file__).parents[1])
pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.timeout(900),
]


def python(*arguments, **environment):
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT / "benchmarks",
        env={**kept, "PYTHONPATH": SOURCE, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
    )


def test_every_kernel_by_the_interpreter(tmp_path):
    """Values, gradients, statistics against float64; nothing read or written outside of the tensors."""
    code = "import sys; sys.argv[0] = 'batchnorm'; from batchnorm.cli import app; app()"
    done = python("-c", code, "check-gpu", "--interpreted", "--out", str(tmp_path / "check.json"))
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-3000:]
    checked = json.loads((tmp_path / "check.json").read_text())["checked"]
    assert len(checked) > 150
    assert {each["wrong"] for each in checked} == {""}


FAULTS = """
import os
os.environ["TRITON_INTERPRET"] = "1"
import torch
from batchnorm.ops.gpu import launch
from batchnorm.ops.gpu.cut import cut
from batchnorm.ops.gpu import merge
from batchnorm.proof.cases import Case
from batchnorm.proof.values import errors
from batchnorm.activations import Activation

case = Case((90, 24), "gaps", torch.float32, Activation("relu"), residual=True)
wrong = lambda: [error.what for error in errors(case, "cpu") if error.is_wrong]
assert wrong() == []

def with_cut(change):
    launch.cut = lambda *given: change(cut(*given))
    found = wrong()
    launch.cut = cut
    return found

widened = lambda made: made._replace(view=made.view._replace(columns=made.view.columns + 8))
longer = lambda made: made._replace(view=made.view._replace(rows=made.view.rows + 1))
shorter = lambda made: made._replace(view=made.view._replace(rows=made.view.rows - 1))
overlapping = lambda made: made._replace(rows_per_part=max(made.rows_per_part - made.block_rows, 1))
print("widened:", with_cut(widened))
print("longer:", with_cut(longer))
print("shorter:", with_cut(shorter))

real = launch.Walk._moments
def swapped(self, partials, *rest, **named):
    return real(self, partials.flip(0), *rest, **named)
launch.Walk._moments = swapped
print("swapped:", wrong())
launch.Walk._moments = real

real_use = launch.Walk.use
def other_eps(self, statistics, eps, *rest, **named):
    return real_use(self, statistics, 1e-3, *rest, **named)
launch.Walk.use = other_eps
print("eps:", wrong())
"""


def test_the_proof_sees_faults():
    """Columns and rows too many read NaN, or write into a band; too few, wrong sums and other constants are off."""
    done = python("-c", FAULTS)
    assert done.returncode == 0, done.stderr[-3000:]
    seen = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert set(seen) == {"widened", "longer", "shorter", "swapped", "eps"}
    assert all(found != "[]" for found in seen.values()), seen
    assert "bands written" in seen["longer"]
    assert "'y'" in seen["shorter"]


FAR = """
import os
os.environ["TRITON_INTERPRET"] = "1"
import torch
from batchnorm.ops.gpu import by_kernels
from batchnorm.ops.gpu.implementation import by_plain

far = 1 << 31  # values from channel to channel: memory that nobody touches between them costs nothing
x = torch.empty(far + 2048, dtype=torch.bfloat16).as_strided((1, 2, 2048), (far + 2048, far, 1))
x.copy_(torch.randn(1, 2, 2048, generator=torch.Generator().manual_seed(0)) + torch.tensor([3.0, -5.0])[:, None])
given = {"x": x, "weight": None, "bias": None, "eps": 1e-5, "act": 0, "slope": 0.0, "residual": None, "mask": None}
for found, should in zip(by_kernels("forward", given), by_plain("forward", given)):
    torch.testing.assert_close(found, should, rtol=1e-2, atol=1e-2)
"""


def test_channels_that_lie_more_than_32_bits_count_from_each_other():
    done = python("-c", FAR)
    assert done.returncode == 0, (done.returncode, done.stderr[-3000:])


def test_what_compilers_make_of_them(tmp_path):
    """16-byte loads and stores, few instructions per value, no stack, for GPUs of NVIDIA and AMD."""
    done = python("gpu_codegen.py", "--into", str(tmp_path), TRITON_CACHE_DIR=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    page = (tmp_path / "gpu-codegen.md").read_text()
    assert all(f"| {target} |" in page for target in ("sm_80", "sm_90", "sm_100", "gfx942"))
