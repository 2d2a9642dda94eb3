"""What tests of several folders share."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import native_forced
import pytest
import starts

native_forced.if_asked()
starts.watch()
pytest_runtest_protocol = starts.pytest_runtest_protocol


@pytest.fixture(scope="session")
def keras(tmp_path_factory):
    """Keras on PyTorch, on the CPU."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("KERAS_BACKEND", "torch")
        environment.setenv("KERAS_HOME", str(tmp_path_factory.mktemp("keras")))  # it writes its settings there
        import keras

        with keras.device("cpu"):
            yield keras


@pytest.fixture(scope="session")
def one_thread():
    """One thread for tiny tensors: on a busy machine a team of threads waits for its last member at every operation."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def fused_calls(monkeypatch):
    """The residual's presence at every call of a batch norm that brings an activation."""
    from batchnorm.activations import NONE
    from batchnorm.nn.layer import BatchNormLayer

    calls = []
    forward = BatchNormLayer.forward

    def counted(self, input, residual=None, mask=None, *, activation=None):
        if activation not in (None, NONE):
            calls.append(residual is not None)
        return forward(self, input, residual, mask, activation=activation)

    monkeypatch.setattr(BatchNormLayer, "forward", counted)
    return calls


ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
REQUIRE = "BATCHNORM_REQUIRE_BROWSER"


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """The system's Chromium or Chrome; without one, the browser that Playwright installed; without that, a skip."""
    from playwright.sync_api import sync_playwright

    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with sync_playwright() as playwright:
        if not found and not Path(playwright.chromium.executable_path).exists():
            said = "there is no browser: install Chromium, or run `.venv/bin/playwright install chromium`"
            pytest.fail(f"{REQUIRE} is set, but {said}") if os.environ.get(REQUIRE) else pytest.skip(said)
        browser = playwright.chromium.launch(executable_path=found, args=ARGUMENTS)
        yield browser
        browser.close()
