"""The libraries import torchvision, and say much as they are imported; one thread for tiny tensors."""

import warnings

import pytest
from public import import_with_torchvision

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import_with_torchvision("lightning.pytorch")
    import_with_torchvision("transformers")


@pytest.fixture(autouse=True, scope="session")
def _on_one_thread(one_thread):
    pass
