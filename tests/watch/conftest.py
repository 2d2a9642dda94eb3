"""One thread for tiny tensors."""

import pytest


@pytest.fixture(autouse=True, scope="session")
def _on_one_thread(one_thread):
    pass
