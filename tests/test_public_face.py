"""The public names: all there, looked up lazily, and torch not imported before it is needed."""

import subprocess
import sys

import pytest

import batchnorm


def test_every_public_name_resolves():
    for name in batchnorm.__all__:
        assert getattr(batchnorm, name) is not None
    assert set(dir(batchnorm)) == set(batchnorm.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'BatchNorm4d'"):
        batchnorm.BatchNorm4d  # noqa: B018


def test_report_is_the_function_whatever_was_imported_before():
    code = "import batchnorm.view, batchnorm; assert callable(batchnorm.report)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_watch_is_the_function_whatever_was_imported_of_the_package_before():
    code = (
        "import batchnorm.watch.recorder, batchnorm, types; from batchnorm.watch import Recorder, watch; "
        "assert batchnorm.watch is watch and isinstance(watch, types.FunctionType)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_and_reading_runs_does_not_import_torch():
    code = (
        "import sys, batchnorm; batchnorm.open_run; batchnorm.report; import batchnorm.cli; "
        "assert 'torch' not in sys.modules, 'torch was imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
