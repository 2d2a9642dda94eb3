"""Data that several tests of the lab train on."""

import numpy as np
import pytest


@pytest.fixture(scope="module")
def blobs(tmp_path_factory):
    """Writes a file of so many samples in three classes; returns its path."""

    def write(samples):
        rng = np.random.default_rng(0)
        y = np.arange(samples) % 3
        path = tmp_path_factory.mktemp("data") / "blobs.npz"
        np.savez(path, x=rng.normal(size=(samples, 6)) + y[:, None], y=y)
        return str(path)

    return write


@pytest.fixture(scope="module")
def source(blobs):
    """33 samples, 26 of them to train on."""
    return blobs(33)
