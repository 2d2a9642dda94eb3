"""mypy and pyright resolve the public face in a file of a user: they know what is there, and flag what is not."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import batchnorm

pytestmark = [pytest.mark.slow, pytest.mark.processes]

USES = """\
import batchnorm as bn
import torch
from batchnorm import convert, watch

model = torch.nn.Sequential(bn.BatchNorm2d(3, activation="relu"), torch.nn.BatchNorm2d(3))
bn.convert(model, fuse=True).append(torch.nn.ReLU())
convert(bn.nn.revert(model), virtual_batch_size=4)
with bn.watch(model, "runs/mine", every=10), watch(model):
    bn.recalibrate(model, [])
print(bn.report("runs/mine").parent, bn.open_run("runs/mine").steps, bn.diagnose(model), bn.port.from_keras)
print(bn.nn.explain_fusion(model)["1"], bn.fold(model).eval(), bn.BatchNorm1d(3).gamma, bn.__version__.split("."))
bn.nope  # wrong
bn.nn.nope  # wrong
bn.convert(3)  # wrong
bn.BatchNorm2d("3")  # wrong
bn.BatchNorm2d(3, activaton="relu")  # wrong
"""
WRONG = [number for number, line in enumerate(USES.splitlines(), 1) if line.endswith("# wrong")]
SOURCE = str(Path(batchnorm.__file__).parents[1])


@pytest.fixture
def uses(tmp_path):
    """A file of uses, in a folder that has nothing else of ours."""
    file = tmp_path / "uses.py"
    file.write_text(USES)
    return file


def run(*command, folder):
    environment = {**os.environ, "MYPYPATH": SOURCE}
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stdout + done.stderr
    return done.stdout


def test_mypy(uses):
    said = run("mypy", "--strict", "--follow-imports=silent", uses.name, folder=uses.parent)
    assert [int(number) for number in re.findall(r"^uses\.py:(\d+): error", said, re.MULTILINE)] == WRONG, said


def test_pyright(uses):
    settings = {"include": ["uses.py"], "extraPaths": [SOURCE], "typeCheckingMode": "standard"}
    (uses.parent / "pyrightconfig.json").write_text(json.dumps(settings))
    said = run("pyright", "--outputjson", "--pythonpath", sys.executable, folder=uses.parent)
    found = [f for f in json.loads(said)["generalDiagnostics"] if f["severity"] == "error"]
    assert sorted({f["range"]["start"]["line"] + 1 for f in found}) == WRONG, said
