"""What every documented example may use without importing it, and the seed every test starts from."""

import sys

import pytest


@pytest.fixture(autouse=True)
def _documented_names(doctest_namespace):
    import torch

    import batchnorm as bn

    doctest_namespace.update(torch=torch, nn=torch.nn, bn=bn)


@pytest.fixture(autouse=True)
def _no_terminal(monkeypatch):
    """What a command prints does not hang on the terminal that the tests run in, or on what stands in for one."""
    for name in ("COLUMNS", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def _seed():
    import torch

    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _nothing_compiled():
    yield
    # Dynamo compiles one function a few times only, and tests share the layers' forward.
    if "torch._dynamo" in sys.modules:
        import torch

        torch._dynamo.reset()
