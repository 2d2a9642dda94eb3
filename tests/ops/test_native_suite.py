"""The layers' own tests once more, with the CPU served as a device that has no kernel of ours.

In processes of their own, for ranks are started by a server that has the first one's environment. What is marked
`kernels` there is promised of our own operators alone: the error that does not grow with the mean, and what is kept.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from native_forced import NATIVE

import batchnorm

pytestmark = pytest.mark.processes

TESTS = Path(__file__).parents[1]
SLOW = (
    "two_hundred_steps or stay_float32_when_the_module_is_cast or trains_where_batches_are_of_one_class or peak "
    "or second_derivatives"
)
FILES = [
    *sorted(file.relative_to(TESTS).as_posix() for file in (TESTS / "nn").glob("test_*.py")),
    "test_functional.py",
    "tools/test_update.py",
]
FILES.remove("nn/test_compiled_layout.py")  # of our operators


@pytest.mark.parametrize("file", FILES)
def test_on_torchs_own_operators(file):
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-m",
        "not kernels",
        "-k",
        f"not ({SLOW})",
    ]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    environment |= {NATIVE: "1", "PYTHONPATH": str(Path(batchnorm.__file__).parents[1])}  # this one, wherever it is run
    done = subprocess.run([*command, file], cwd=TESTS, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
