"""What a data file unpacks to is bounded, whatever its headers say, and the message says by what."""

import gzip
import os
import struct

import numpy as np
import pytest

from batchnorm.lab import DataError
from batchnorm.lab.data import load
from batchnorm.lab.sources import read_path

LIMIT = 200_000


def csv_of_one_line(path):
    (path / "a.csv.gz").write_bytes(gzip.compress(b"label," + b"," * LIMIT))
    return path / "a.csv.gz"


def csv_of_short_lines(path):
    (path / "a.csv.gz").write_bytes(gzip.compress(b"label,x\n" + b"a,1\n" * (LIMIT // 20)))
    return path / "a.csv.gz"


def csv_of_a_long_label(path):
    """An array of words has room for the longest in each."""
    (path / "a.csv").write_bytes(b"label,x\n" + b"a,1\n" * 100 + b"b" * 1000 + b",1\n")
    return path / "a.csv"


def cifar(path):
    (path / "a.bin.gz").write_bytes(gzip.compress(bytes(3073 * 100)))
    return path / "a.bin.gz"


def idx(path):
    images = bytes([0, 0, 8, 3]) + struct.pack(">3I", LIMIT // 100, 10, 10) + bytes(LIMIT)
    (path / "images-idx3").write_bytes(gzip.compress(images))
    (path / "labels-idx1").write_bytes(b"")
    return path / "images-idx3"


def npz(path):
    np.savez_compressed(path / "a.npz", x=np.zeros((LIMIT // 8, 2)), y=np.zeros(LIMIT // 8, int))
    return path / "a.npz"


WRITERS = [csv_of_one_line, csv_of_short_lines, csv_of_a_long_label, cifar, idx, npz]


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
def test_the_limit_is_kept_named_and_can_be_raised(tmp_path, monkeypatch, write):
    path = write(tmp_path)
    monkeypatch.setenv("BATCHNORM_READ_LIMIT", str(LIMIT))
    with pytest.raises(
        DataError, match=r"beyond the limit of 200,000; if you trust the file, raise BATCHNORM_READ_LIMIT"
    ):
        read_path(path)
    monkeypatch.delenv("BATCHNORM_READ_LIMIT")
    if write not in (idx, csv_of_one_line):
        read_path(path)


def test_what_is_not_compressed_has_no_limit(tmp_path, monkeypatch):
    np.savez(tmp_path / "a.npz", x=np.zeros((LIMIT, 2)), y=np.zeros(LIMIT, int))
    (tmp_path / "a.bin").write_bytes(bytes(3073 * 100))
    monkeypatch.setenv("BATCHNORM_READ_LIMIT", str(LIMIT))
    assert len(read_path(tmp_path / "a.npz")[0][0]) == LIMIT
    assert len(read_path(tmp_path / "a.bin")[0][0]) == 100


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "data_batch_1.bin")
    with pytest.raises(DataError, match=r"data_batch_1\.bin.*must be a regular file"):
        load(str(tmp_path))


def test_a_message_is_one_line_whatever_the_file_holds(tmp_path):
    (tmp_path / "a.csv").write_text('"a\nb\nc",d\n')
    with pytest.raises(DataError, match=r"a\.csv: line 1: expected .* in a b c,d$"):
        load(str(tmp_path / "a.csv"))


def test_labels_of_more_digits_than_an_integer_has_are_words(tmp_path):
    (tmp_path / "a.csv").write_text("label,x\n" + "".join(f"{10**20 + i % 2},{i}\n" for i in range(10)))
    assert load(str(tmp_path / "a.csv")).classes == [str(10**20), str(10**20 + 1)]
