"""The journal: every cut and every garbled byte leaves the frames before it, and appending goes on after them."""

import os
import struct
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchnorm.runs.journal import HEADER, Journal, frame, read_frames

RECORDS = [(0, b"zero"), (1, b""), (5, bytes(range(40))), (5, b"twice"), (9, b"\xff" * 7)]


def contents(path):
    frames = read_frames(path)
    return [(int(step), bytes(frames.payload(i))) for i, step in enumerate(frames.steps)]


@pytest.fixture
def journal(tmp_path):
    path = tmp_path / "a.bin"
    with Journal(path) as file:
        for record in RECORDS:
            file.append([record])
    return path


def test_frame_is_as_documented():
    """Built by hand from the words in the docs, not with the module's own structs."""
    body = struct.pack("<I", 3) + struct.pack("<q", -7) + b"abc"
    assert frame(-7, b"abc") == b"BNJ1" + struct.pack("<II", 3, zlib.crc32(body)) + struct.pack("<q", -7) + b"abc"


def test_reads_what_was_appended(journal):
    assert contents(journal) == RECORDS
    assert read_frames(journal).damage is None


def test_missing_file_is_empty(tmp_path):
    frames = read_frames(tmp_path / "none.bin")
    assert len(frames) == 0
    assert frames.damage is None


def test_every_cut_keeps_the_whole_frames(journal, tmp_path):
    data = journal.read_bytes()
    ends = [0]
    for _, payload in RECORDS:
        ends.append(ends[-1] + HEADER.size + len(payload))
    for cut in range(len(data) + 1):
        path = tmp_path / "cut.bin"
        path.write_bytes(data[:cut])
        whole = sum(end <= cut for end in ends) - 1
        assert contents(path) == RECORDS[:whole]
        assert (read_frames(path).damage is None) == (cut in ends)
        with Journal(path) as reopened:
            reopened.append([(10, b"on")])
        assert contents(path) == [*RECORDS[:whole], (10, b"on")]
        assert read_frames(path).damage is None


def test_every_garbled_byte_is_found(journal, tmp_path):
    data = journal.read_bytes()
    at = 0
    for k, (_, payload) in enumerate(RECORDS):
        for place in range(at, at + HEADER.size + len(payload)):
            garbled = bytearray(data)
            garbled[place] ^= 0x10
            path = tmp_path / "garbled.bin"
            path.write_bytes(garbled)
            assert contents(path) == RECORDS[:k]
            assert f"kept the {k} whole frames" in (read_frames(path).damage or "")
        at += HEADER.size + len(payload)


@given(tail=st.binary(min_size=1, max_size=60))
def test_any_tail_is_reported_and_cut(tmp_path_factory, tail):
    path = tmp_path_factory.mktemp("tail") / "a.bin"
    path.write_bytes(frame(3, b"three") + tail)
    assert contents(path) == [(3, b"three")]
    assert read_frames(path).damage
    with Journal(path) as reopened:
        reopened.append([(4, b"four")])
    assert contents(path) == [(3, b"three"), (4, b"four")]


@given(data=st.binary(max_size=100))
def test_no_garbage_is_fatal(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("garbage") / "a.bin"
    path.write_bytes(data)
    assert contents(path) == []


def test_steps_never_go_back(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(frame(5, b"five") + frame(4, b"four"))
    assert contents(path) == [(5, b"five")]
    assert "step 4 after one of step 5" in (read_frames(path).damage or "")


def test_lengths_that_cannot_be_are_bad_frames(journal):
    frames = read_frames(journal, lambda length: length == 4)
    assert frames.steps.tolist() == [0]
    assert "impossible length" in (frames.damage or "")


@pytest.mark.parametrize(("before", "kept"), [(None, 5), (0, 0), (1, 1), (5, 2), (6, 4), (100, 5)])
def test_reopening_drops_steps_from_before_step_on(journal, before, kept):
    Journal(journal, before).close()
    assert contents(journal) == RECORDS[:kept]


def test_short_writes_are_completed(tmp_path, monkeypatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, bytes(data[:3])))
    with Journal(tmp_path / "a.bin") as journal:
        journal.append(RECORDS)
    monkeypatch.undo()
    assert contents(tmp_path / "a.bin") == RECORDS


def test_the_disk_is_waited_for_at_most_once_a_second(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fdatasync", synced.append)
    clock = [100.0]
    monkeypatch.setattr("batchnorm.runs.journal.time.monotonic", lambda: clock[0])
    journal = Journal(tmp_path / "a.bin")
    for _ in range(30):  # 3 seconds
        clock[0] += 0.1
        journal.append([(0, b"x")])
    # Steps of 0.1 in floating point: the third second may fall just short of its end.
    assert len(synced) in (2, 3)
    journal.append([(0, b"x")])
    journal.close()
    assert 3 <= len(synced) <= 4
