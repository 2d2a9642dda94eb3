"""What a build does where it cannot compile: it says so and fails, unless nothing was to be compiled."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.processes

ROOT = Path(__file__).parents[1]
BUILD = """
import runpy, sys
if {without_torch}:
    sys.modules["torch"] = None
sys.argv[:] = ["setup.py", "--quiet", "build_ext", "--build-lib", sys.argv[1], "--build-temp", sys.argv[1]]
runpy.run_path("setup.py", run_name="__main__")
"""


def build(folder, without_torch=False, **environment):
    """The status of compiling into the folder, and what was said."""
    kept = {name: value for name, value in os.environ.items() if name not in ("CXX", "BATCHNORM_PURE")}
    command = [sys.executable, "-c", BUILD.format(without_torch=without_torch), str(folder)]
    done = subprocess.run(command, cwd=ROOT, env={**kept, **environment}, capture_output=True, text=True, check=False)
    assert not list(folder.rglob("*.so"))
    return done.returncode, done.stdout + done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="nothing is compiled there")
@pytest.mark.parametrize(
    ("options", "rule", "cure"),
    [
        ({"without_torch": True}, "compiling the operators needs torch 2.10 or newer where", "--no-build-isolation"),
        ({"CXX": "no-such-compiler"}, "the operators did not compile", "CXX=clang++"),
    ],
)
def test_a_build_that_should_have_compiled_fails_and_says_why(tmp_path, options, rule, cure):
    status, said = build(tmp_path, **options)
    assert status == 1
    assert f"batchnorm: {rule}" in said
    assert cure in said
    assert "BATCHNORM_PURE=1" in said


@pytest.mark.parametrize(
    ("environment", "reason"), [({"BATCHNORM_PURE": "1"}, "BATCHNORM_PURE is set"), ({"PATH": ""}, "no C++ compiler")]
)
def test_a_pure_package_is_built_on_purpose_or_without_a_compiler(tmp_path, environment, reason):
    status, said = build(tmp_path, without_torch=True, **environment)
    assert status == 0, said
    assert "built without its compiled operators" in said
    assert reason in said
