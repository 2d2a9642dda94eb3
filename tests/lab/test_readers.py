"""Readers against bytes written by hand, and one clear line for every way in which a file can be bad."""

from __future__ import annotations

import gzip
import io
import re
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest

from batchnorm.lab import DataError
from batchnorm.lab.binary import read_cifar10, read_idx
from batchnorm.lab.tables import read_csv, read_npz

# Two images of 2 x 3, each byte written out.
IDX_IMAGES = bytes.fromhex("00000803 00000002 00000002 00000003 000102030405 fafbfcfdfeff")
CSV = b"width,label,height\n1.5,cat,2\n-3,dog,4e1\n"


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def one_line(error: pytest.ExceptionInfo[BaseException], path: Path, place: str) -> str:
    """The message, after checking that it is one line that names the file and the place."""
    message = str(error.value)
    assert message.startswith(f"{path}: {place}: expected "), message
    assert "\n" not in message
    assert ", found " in message
    return message


@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_idx_images(tmp_path, compress):
    images = read_idx(write(tmp_path / "images", compress(IDX_IMAGES)))
    np.testing.assert_array_equal(images, [[[0, 1, 2], [3, 4, 5]], [[250, 251, 252], [253, 254, 255]]])
    assert images.dtype == np.uint8


@pytest.mark.parametrize(
    ("code", "packed", "values"),
    [
        (0x09, struct.pack(">2b", -1, 7), [-1, 7]),
        (0x0B, struct.pack(">2h", -300, 7), [-300, 7]),
        (0x0C, struct.pack(">2i", -70000, 7), [-70000, 7]),
        (0x0D, struct.pack(">2f", -0.5, 7), [-0.5, 7]),
        (0x0E, struct.pack(">2d", -0.1, 7), [-0.1, 7]),
    ],
)
def test_idx_every_type_is_big_endian(tmp_path, code, packed, values):
    array = read_idx(write(tmp_path / "f", bytes([0, 0, code, 1]) + struct.pack(">I", 2) + packed))
    np.testing.assert_array_equal(array, values)
    assert array.dtype.isnative


@pytest.mark.parametrize(
    ("data", "place", "found"),
    [
        (b"", "byte 0", "an empty file"),
        (b"\x00\x00\x08", "byte 0", "00 00 08"),
        (b"\x01\x00" + IDX_IMAGES[2:], "byte 0", "01 00 08 03"),
        (b"\x00\x00\x07" + IDX_IMAGES[3:], "byte 0", "00 00 07 03"),  # no such type
        (IDX_IMAGES[:9], "byte 4", "5 bytes"),
        (IDX_IMAGES[:-1], "byte 16", "11"),
        (IDX_IMAGES + b"x", "byte 16", "more"),
        (IDX_IMAGES[:4] + bytes(4) + IDX_IMAGES[8:], "byte 4", "sizes (0, 2, 3)"),
        (IDX_IMAGES[:4] + b"\xff" * 12 + IDX_IMAGES[16:], "byte 16", "12"),  # 2^96 values: must not be believed
    ],
)
@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_idx_bad(tmp_path, compress, data, place, found):
    path = write(tmp_path / "images", compress(data))
    with pytest.raises(DataError) as error:
        read_idx(path)
    assert one_line(error, path, place).endswith(f"found {found}")


def cut_short(data: bytes) -> bytes:
    return data[:-9]


def flip_checksum(data: bytes) -> bytes:
    return data[:-8] + bytes([data[-8] ^ 1]) + data[-7:]


@pytest.mark.parametrize("damage", [cut_short, flip_checksum])
def test_idx_damaged_gzip(tmp_path, damage):
    path = write(tmp_path / "images.gz", damage(gzip.compress(IDX_IMAGES)))
    with pytest.raises(DataError, match=r"byte \d+ of the data: expected a whole gzip stream"):
        read_idx(path)


@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_cifar10(tmp_path, compress):
    pixels = np.arange(2 * 3072).astype(np.uint8).reshape(2, 3072)
    data = b"\x03" + pixels[0].tobytes() + b"\x09" + pixels[1].tobytes()
    images, labels = read_cifar10(write(tmp_path / "a.bin", compress(data)))
    assert labels.tolist() == [3, 9]
    # Red plane first, row by row: pixel (row 1, column 2) of green is byte 1024 + 32 + 2.
    assert images.shape == (2, 3, 32, 32)
    assert images[1, 1, 1, 2] == pixels[1, 1024 + 32 + 2]


@pytest.mark.parametrize(
    ("data", "place", "found"),
    [
        (b"", "byte 0", "0 bytes"),
        (bytes(3073) + bytes(3000), "byte 3073", "3000 bytes"),
        (bytes(3073) + b"\x0a" + bytes(3072), "byte 3073", "10"),
    ],
)
def test_cifar10_bad(tmp_path, data, place, found):
    path = write(tmp_path / "a.bin", data)
    with pytest.raises(DataError) as error:
        read_cifar10(path)
    assert one_line(error, path, place).endswith(f"found {found}")


def test_npz_both_spellings(tmp_path):
    x, y = np.arange(6.0).reshape(3, 2), np.array([0, 1, 1])
    np.savez(tmp_path / "a.npz", x=x, y=y)
    train, test = read_npz(tmp_path / "a.npz")
    np.testing.assert_array_equal(train["x"], x)
    assert test is None
    np.savez_compressed(tmp_path / "b.npz", x_train=x, y_train=y, x_test=x + 1, y_test=y, other=y)
    train, test = read_npz(tmp_path / "b.npz")
    np.testing.assert_array_equal(train["y"], y)
    assert test is not None
    np.testing.assert_array_equal(test["x"], x + 1)


def member(data: bytes, compression: int = zipfile.ZIP_STORED) -> bytes:
    """An .npz whose x is these bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.writestr("x.npy", data)
        archive.writestr("y.npy", npy(np.zeros(3, np.int64)))
    return buffer.getvalue()


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


GOOD = npy(np.zeros((3, 2)))


@pytest.mark.parametrize(
    ("data", "place", "found"),
    [
        (b"not a zip", "the file", "damage"),
        (member(GOOD)[:-30], "the file", "damage"),
        (member(GOOD).replace(b"x.npy", b"z.npy"), "arrays", "y, z"),
        (member(b"\x93NUMPY\x01\x00"), "array x", ""),
        (member(GOOD[:-1]), "array x", "175 bytes"),
        (member(GOOD.replace(b"(3, 2)", b"(9, 9)")), "array x", "176 bytes"),
        (member(GOOD.replace(b"(3, 2), ", b"(10**9,)")), "array x", ""),
        (member(npy(np.array([{}, None]))), "array x", "Python objects (object), which are not read"),
        (member(bytes(100_000), zipfile.ZIP_LZMA), "array x", ""),
    ],
)
def test_npz_bad(tmp_path, data, place, found):
    path = write(tmp_path / "a.npz", data)
    with pytest.raises(DataError) as error:
        read_npz(path)
    assert f"found {found}" in one_line(error, path, place)


def test_npz_bad_checksum(tmp_path):
    data = bytearray(member(npy(np.arange(6.0).reshape(3, 2))))
    data[data.index(np.float64(5).tobytes()) + 7] ^= 1
    path = write(tmp_path / "a.npz", bytes(data))
    with pytest.raises(DataError, match=r"the file: expected .* damage \(BadZipFile: Bad CRC"):
        read_npz(path)


def test_npz_never_unpickles(tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "sprung",))

    path = write(tmp_path / "a.npz", member(npy(np.array([Trap()], object))))
    with pytest.raises(DataError, match="Python objects"):
        read_npz(path)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    "data", [CSV, b"\xef\xbb\xbf" + CSV, CSV.replace(b"\n", b"\r\n"), CSV + b"\n\n", gzip.compress(CSV, mtime=0)]
)
def test_csv(tmp_path, data):
    x, y = read_csv(write(tmp_path / "a.csv", data))
    np.testing.assert_array_equal(x, [[1.5, 2], [-3, 40]])
    assert y.tolist() == ["cat", "dog"]


@pytest.mark.parametrize(
    ("data", "place", "found"),
    [
        (b"", "line 1", "0 of them in an empty file"),
        (b"1,2,3\n4,5,6\n", "line 1", "0 of them in 1,2,3"),
        (b"label,y,z\n1,2,3\n", "line 1", "2 of them in label,y,z"),
        (b"label,z\n", "line 2", "none"),
        (b"label\na\n", "line 2", "none"),
        (CSV + b"1,cat\n", "line 4", "2"),
        (CSV + b"\n1,cat,2,3\n", "line 5", "4"),
        (CSV + b"1,cat,two\n", "line 4, column height", "'two'"),
        (CSV + b"1,cat,\n", "line 4, column height", "''"),
        (CSV + b"nan,cat,2\n", "line 4, column width", "'nan'"),
        (CSV + b"1,cat,1e39\n", "line 4, column height", "'1e39'"),  # beyond float32
        (CSV + b"1, ,2\n", "line 4, column label", "an empty field"),
        (CSV + b"1,\xff\xfe,2\n", "line 1", "'utf-8' codec"),
        (gzip.compress(CSV, mtime=0)[:-12], "line", ""),
    ],
)
def test_csv_bad(tmp_path, data, place, found):
    path = write(tmp_path / "a.csv", data)
    with pytest.raises(DataError) as error:
        read_csv(path)
    message = str(error.value)
    assert re.match(rf"{re.escape(str(path))}: {place}[^:]*: expected ", message), message
    assert f"found {found}" in message
    assert "\n" not in message
