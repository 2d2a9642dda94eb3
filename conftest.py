"""What every documented example may use without importing it, and the seed every test starts from."""

import pytest


@pytest.fixture(autouse=True)
def _documented_names(doctest_namespace):
    import torch

    import batchnorm as bn

    doctest_namespace.update(torch=torch, nn=torch.nn, bn=bn)


@pytest.fixture(autouse=True)
def _seed():
    import torch

    torch.manual_seed(0)
