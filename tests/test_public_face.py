"""The public names: all there, looked up lazily, and torch not imported before it is needed."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import batchnorm

ROOT = Path(__file__).parents[1]


def test_every_public_name_resolves():
    for name in batchnorm.__all__:
        assert getattr(batchnorm, name) is not None
    assert set(dir(batchnorm)) == {*batchnorm.__all__, "nn"}


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'BatchNorm4d'"):
        batchnorm.BatchNorm4d  # noqa: B018


@pytest.mark.processes
def test_the_layers_room_is_there_without_an_import_of_its_own():
    code = "import batchnorm as bn; print(bn.nn.explain_fusion.__name__, bn.nn.BatchNorm2d is bn.BatchNorm2d)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["explain_fusion", "True"]


def test_the_help_of_each_layer_stands_by_itself():
    """The three differ in their first line and their example alone, and say what every argument means."""
    layers = batchnorm.BatchNorm1d, batchnorm.BatchNorm2d, batchnorm.BatchNorm3d
    texts = [inspect.cleandoc(layer.__doc__).split("\n", 1)[1].split("Example:")[0] for layer in layers]
    assert texts[0] == texts[1] == texts[2]
    described = re.findall(r"\w+", " ".join(re.findall(r"^    ([a-z_, ]+):", texts[0], re.MULTILINE)))
    assert {*described, "process_group"} == set(inspect.signature(layers[0]).parameters)  # which `sync` tells of


def test_the_version_is_written_once():
    """CITATION.cff has to repeat it; nothing else does."""
    cited = re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert cited
    assert cited[1] == batchnorm.__version__
    assert 'dynamic = ["version"]' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.processes
def test_report_is_the_function_whatever_was_imported_before():
    code = "import batchnorm.view, batchnorm; assert callable(batchnorm.report)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.processes
def test_watch_is_the_function_whatever_was_imported_of_the_package_before():
    code = (
        "import batchnorm.watch.recorder, batchnorm, types; from batchnorm.watch import Recorder, watch; "
        "assert batchnorm.watch is watch and isinstance(watch, types.FunctionType)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.processes
def test_importing_and_reading_runs_does_not_import_torch():
    code = (
        "import sys, batchnorm; batchnorm.open_run; batchnorm.report; import batchnorm.cli; "
        "assert 'torch' not in sys.modules, 'torch was imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
