"""The same bits on another CPU: driver.cpp, compiled for it and run by an emulator, beside the operators on this one.

`make arm` runs this, with the command that starts the driver in BATCHNORM_DRIVER.
"""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import problems
import pytest
from problems import Case, cases

from batchnorm.ops.cpu import COMPILED

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif("BATCHNORM_DRIVER" not in os.environ, reason="make arm runs it"),
    pytest.mark.skipif(not COMPILED, reason="installed without a compiler"),
]

PROBLEMS = [sys.executable, str(problems.__file__)]
TIERS = ("default", "avx2", "avx512")
FRACTION_BITS = {"float32": 23, "float64": 52, "bfloat16": 7, "float16": 10}


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, Path]:
    """What the other CPU and each of this one's instruction sets computed."""
    folder = tmp_path_factory.mktemp("arm")

    def written(name: str, command: list[str], stdin: Path | None = None, **environment: str) -> Path:
        path = folder / name
        with path.open("wb") as out, (stdin or Path(os.devnull)).open("rb") as into:
            subprocess.run(command, stdin=into, stdout=out, env={**os.environ, **environment}, check=True)
        return path

    inputs = written("inputs", [*PROBLEMS, "inputs"])
    other = {"other": written("other", shlex.split(os.environ["BATCHNORM_DRIVER"]), inputs)}
    return other | {t: written(t, [*PROBLEMS, "results"], ATEN_CPU_CAPABILITY=t) for t in TIERS}


def without_nan(bits: np.ndarray, type: str) -> np.ndarray:
    """One NaN for all: its sign and payload are the machine's own (x86 makes negative ones, ARM positive ones)."""
    width, fraction = 8 * bits.itemsize, FRACTION_BITS[type]
    infinity = ((1 << (width - 1 - fraction)) - 1) << fraction
    return np.where(bits & ((1 << (width - 1)) - 1) > infinity, bits.dtype.type(infinity + 1), bits)


def differences(case: Case, ours: np.ndarray, other: np.ndarray) -> list[str]:
    """Names of what differs, with how many values do."""
    found, at = [], 0
    for name, dtype, length in case.results():
        end = at + length * dtype.itemsize
        kind = "float64" if dtype == np.uint64 else case.type
        a, b = (without_nan(file[at:end].view(dtype), kind) for file in (ours, other))
        if (a != b).any():
            found.append(f"{name}: {np.count_nonzero(a != b)} of {length}")
        at = end
    return found


@pytest.mark.parametrize("tier", TIERS)
def test_another_cpu_computes_the_same_bits(found, tier):
    ours, other = (np.memmap(found[name], np.uint8, "r") for name in (tier, "other"))
    sizes = [sum(dtype.itemsize * length for _, dtype, length in case.results()) for case in cases()]
    assert len(ours) == len(other) == sum(sizes)
    ends = np.cumsum(sizes)
    wrong = [
        (case, what)
        for case, size, end in zip(cases(), sizes, ends, strict=True)
        if (what := differences(case, ours[end - size : end], other[end - size : end]))
    ]
    assert not wrong, f"{len(wrong)} of {len(sizes)} cases, among them {wrong[0]}"


def test_the_cases_have_what_may_differ(found):
    """Else the test above would compare less than it says."""
    assert {case.activation for case in cases()} == set(range(11))
    values = np.memmap(found["other"], np.uint8, "r")[: cases()[0].size(0) * 4].view(np.float32)
    assert np.isnan(values).any()
    assert np.isfinite(values).any()
