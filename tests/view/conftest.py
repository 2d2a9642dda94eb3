"""A real headless Chromium with the network off, and pages in it that must stay free of errors and requests."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from synthetic import layer, probe_values, story, write_run

import batchnorm as bn
from batchnorm.runs import Run, open_run


def wait_until(page: Any, condition: str, seconds: float = 15) -> None:
    """Wait for a condition in the page; Playwright's own way polls by eval, which the page's policy forbids."""
    end = time.monotonic() + seconds
    while not page.evaluate(f"Boolean({condition})"):
        assert time.monotonic() < end, f"never came true: {condition}"
        page.wait_for_timeout(20)


@pytest.fixture
def open_page(browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens a page offline and waits for its first charts; in the end nothing may have gone wrong in any of them."""
    contexts, problems = [], []

    def opener(path: Path, *, charts: bool = True, address: str = "", **options: Any) -> Any:
        options = {"viewport": {"width": 1280, "height": 800}, **options}
        context = browser.new_context(offline=True, **options)
        contexts.append(context)
        page = context.new_page()
        url = path.resolve().as_uri() + address

        def route(route: Any) -> None:
            if route.request.url.split("#")[0] == path.resolve().as_uri():
                return route.continue_()
            problems.append(f"request: {route.request.url}")
            return route.abort()

        page.route("**/*", route)
        # A violation of the page's policy is told on the console too.
        page.on("console", lambda message: problems.append(f"console {message.type}: {message.text}"))
        page.on("pageerror", lambda error: problems.append(f"error: {error}"))
        page.on("dialog", lambda dialog: (problems.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.goto(url)
        drawn = " && document.querySelectorAll('#panels svg.marks').length === 2" if charts else ""
        wait_until(page, "'batchnorm' in globalThis" + drawn)
        return page

    yield opener
    for context in contexts:
        context.close()
    assert problems == []


LAYERS = (layer("net.bn1", 4), layer("net.bn2", 3, momentum=None))
STEPS, BATCHES = 30, 5


@pytest.fixture(scope="session")
def run_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole plain run: two layers, 30 steps 0, 2, ..., 58, probes of 5 batches at steps 10 and 50."""
    values = [story(info, STEPS, seed) for seed, info in enumerate(LAYERS)]
    return write_run(
        tmp_path_factory.mktemp("reporting") / "run",
        LAYERS,
        values,
        steps=range(0, 2 * STEPS, 2),
        probes=probe_values([10, 50], BATCHES, 7),
        meta={"data": "digits", "lr": 0.1},
    )


@pytest.fixture(scope="session")
def experiment_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four arms with results, as `batchnorm train` leaves them."""
    path = tmp_path_factory.mktemp("reporting") / "experiment"
    draw = np.random.default_rng(3)
    results: dict[str, Any] = {}
    for arm, accuracy in (("learned", 0.98), ("fixed", 0.97), ("per-batch", 0.9), ("none", 0.8)):
        curve = {"step": [10, 20, 29], "test_accuracy": [accuracy - 0.3, accuracy - 0.1, accuracy], "loss": [2, 1, 0.5]}
        results[arm] = {"test_accuracy": accuracy, "train_accuracy": 0.99, "steps": 30, "seconds": 1.5, "curve": curve}
    singles = draw.uniform(0.4, 0.9, 6)
    results["per-batch"] |= {
        "single_pair_accuracy": {
            "min": singles.min(),
            "median": float(np.median(singles)),
            "max": singles.max(),
            "all": singles.tolist(),
        },
        "pair_spread": {"gamma_std": 0.1, "beta_std": 0.05},
    }
    write_run(path, arms=list(results), results={"arms": results}, meta={"data": "digits", "model": "mlp"})
    for arm in results:
        layers = () if arm == "none" else (layer("bn", 4),)
        write_run(path / arm, layers, [story(info, STEPS, len(arm)) for info in layers])
    return path


@pytest.fixture(scope="session")
def page_path(run_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of the plain run."""
    return bn.report(run_path, tmp_path_factory.mktemp("page") / "report.html")


@pytest.fixture
def page(open_page: Callable[..., Any], page_path: Path) -> Any:
    """The page of the plain run, opened."""
    return open_page(page_path)


@pytest.fixture(scope="session")
def run(run_path: Path) -> Run:
    """The plain run."""
    return open_run(run_path)
