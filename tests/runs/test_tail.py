"""The tail: whatever a run's files go through between two looks, it shows what `open_run` shows of the same bytes."""

import json
import os
import resource
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from synthetic import layer, probe_values, story, write_run

from batchnorm.runs import open_run, tail
from batchnorm.runs.folder import create_folder, end_folder, reopen_folder
from batchnorm.runs.journal import HEADER, Journal, frame
from batchnorm.runs.lines import Lines
from batchnorm.runs.schema import ALERTS, PROBED, PROBES, QUANTITIES, SCALARS, STATS, VECTORS, stats_dtype
from batchnorm.runs.tail import Tail

LAYERS = [layer("a", 2), layer("b", 3, affine=False)]
RECORD = stats_dtype(LAYERS)
JOURNALS = {STATS: RECORD.itemsize, VECTORS: 5 * 8 * 4, PROBES: 5 * 2 * 4}


def everything(run):
    """All that a run says, but for its path."""
    said = [run.status, run.steps, run.scalars(), run.alerts(), run.results, run.meta, run.recorded]
    for info in run.layers:
        said += [run.counts(info.name), run.forwards(info.name), run.nonfinite(info.name)]
        said += [run.stats(info.name, q) for q in QUANTITIES]
        said += [part for q in QUANTITIES for part in run.vectors(info.name, q)]
        said += [part for q in PROBED for part in run.probes(info.name, q)]
    return said


def check_same(followed, path):
    whole = open_run(path)
    for mine, theirs in zip(everything(followed), everything(whole), strict=True):
        np.testing.assert_equal(mine, theirs)
    # What a running recorder has not written to its end is no damage: the rest will come.
    expected = [line for line in whole.damage if not (whole.status == "running" and "torn" in line)]
    assert followed.damage == expected
    assert list(followed.arms) == list(whole.arms)
    for name, arm in whole.arms.items():
        check_same(followed.arms[name], arm.path)


def nonfinite_record(draw):
    record = np.zeros((), RECORD)
    record["count"], record["forwards"] = draw.integers(1, 99), 1
    record["stats"] = draw.normal(size=record["stats"].shape)
    return record.tobytes()


class Writer:
    """Writes a run as the recorder does, but in pieces that end anywhere."""

    def __init__(self, path, seed):
        self.path, self.draw, self.step = path, np.random.default_rng(seed), 0
        self.lock = create_folder(path, LAYERS, {"seed": 0}, {})
        self.queued = dict.fromkeys((*JOURNALS, SCALARS, ALERTS), b"")

    def record(self, name):
        self.step += int(self.draw.integers(0, 3))
        if name in JOURNALS:
            payload = nonfinite_record(self.draw) if name == STATS else self.draw.bytes(JOURNALS[name] // 4 * 4)
            self.queued[name] += frame(self.step, payload)
        else:
            row = {"step": self.step, "loss": float(self.draw.normal())}
            self.queued[name] += json.dumps(row).encode() + b"\n"

    def write(self, name, size):
        with open(self.path / name, "ab") as file:
            file.write(self.queued[name][:size])
        self.queued[name] = self.queued[name][size:]

    def spoil(self, name):
        with open(self.path / name, "ab") as file:
            file.write(b"spoiled\n" * 5)

    def kill(self):
        self.lock.release()
        self.queued = dict.fromkeys(self.queued, b"")

    def resume(self, before):
        self.kill()
        self.lock = reopen_folder(self.path, LAYERS, None)
        for name, size in JOURNALS.items():
            Journal(self.path / name, before, lambda n, size=size: n % size == 0 and n > 0).close()
        for name in (SCALARS, ALERTS):
            Lines(self.path / name, before).close()
        self.step = before

    def finish(self):
        for name, rest in self.queued.items():
            self.write(name, len(rest))
        end_folder(self.path, "finished", {"steps": self.step})
        self.lock.release()


NAMES = st.sampled_from((STATS, STATS, VECTORS, PROBES, SCALARS, ALERTS))
ACTIONS = st.one_of(
    st.tuples(st.just("record"), NAMES),
    st.tuples(st.just("write"), NAMES, st.one_of(st.integers(1, 40), st.integers(100, 3000))),
    st.tuples(st.just("look")),
    st.tuples(st.just("resume"), st.integers(0, 8)),
    st.tuples(st.just("kill")),
    st.tuples(st.just("finish")),
    st.tuples(st.just("spoil"), NAMES),
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=150)
@given(
    actions=st.lists(ACTIONS, max_size=40), block=st.sampled_from((HEADER.size, 64, 1 << 20)), seed=st.integers(0, 9)
)
def test_any_history_reads_as_open_run_reads_it(tmp_path_factory, actions, block, seed):
    path = tmp_path_factory.mktemp("tail") / "run"
    follower = Tail(path)
    assert follower.refresh() is None
    writer = Writer(path, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tail, "_BLOCK", block)  # frames smaller and larger than what is read at once
        for action, *how in [*actions, ("look",), ("finish",), ("look",)]:
            if action == "look":
                run = follower.refresh()
                assert run is not None
                check_same(run, path)
            else:
                getattr(writer, action)(*how)
    writer.lock.release()


def test_the_stamp_changes_with_each_change_and_only_then(tmp_path):
    follower = Tail(tmp_path / "run")
    stamps = [follower.stamp()]

    def changes():
        stamps.append(follower.stamp())
        assert follower.stamp() == stamps[-1]
        return stamps[-1] != stamps[-2]

    writer = Writer(tmp_path / "run", 0)
    assert changes()
    for name in (STATS, VECTORS, PROBES, SCALARS, ALERTS):
        writer.record(name)
        assert not changes()
        writer.write(name, 10_000)
        assert changes(), name
    writer.kill()  # no file changes, only the lock is free
    assert changes()
    assert follower.refresh().status == "interrupted"


def test_only_what_is_new_is_read(tmp_path, monkeypatch):
    writer = Writer(tmp_path / "run", 0)
    for _ in range(100):
        writer.record(STATS)
    writer.write(STATS, 10**6)
    follower = Tail(tmp_path / "run")
    before = follower.refresh()
    values = before.stats("a", "gamma").copy()
    read = []
    fill = tail._fill
    monkeypatch.setattr(tail, "_fill", lambda file, view: read.append(len(view)) or fill(file, view))
    assert len(follower.refresh().steps) == 100
    assert read == []
    writer.record(STATS)
    writer.write(STATS, 10**6)
    assert len(follower.refresh().steps) == 101
    assert read == [RECORD.itemsize + 20]
    # The one handed out before is as it was, though the numbers are shared.
    np.testing.assert_array_equal(before.stats("a", "gamma"), values)
    assert len(before.counts("a")) == 100
    writer.finish()
    assert len(follower.refresh().steps) == 101
    assert len(read) == 1  # the end cuts nothing, so nothing is read again


def test_it_holds_no_file_and_no_lock(tmp_path):
    writer = Writer(tmp_path / "run", 0)
    follower = Tail(tmp_path / "run")
    for name in (STATS, VECTORS, PROBES, SCALARS, ALERTS):
        writer.record(name)
        writer.write(name, 10_000)
    everything(follower.refresh())
    held = [
        os.readlink(f"/proc/self/fd/{fd}")
        for fd in os.listdir("/proc/self/fd")
        if os.path.exists(f"/proc/self/fd/{fd}")
    ]
    assert [path for path in held if str(tmp_path) in path] == [str(tmp_path / "run" / ".lock")]  # the writer's own
    mapped = Path("/proc/self/maps").read_text()
    assert str(tmp_path) not in mapped
    writer.kill()
    everything(follower.refresh())
    writer.resume(0)  # nobody is in its way


def test_a_cut_after_the_look_kills_nobody(tmp_path):
    """A file in a memory map would end this process with SIGBUS."""
    writer = Writer(tmp_path / "run", 0)
    for _ in range(200):
        writer.record(STATS)
    writer.write(STATS, 10**7)
    run = Tail(tmp_path / "run").refresh()
    assert len(run.steps) == 200
    assert resource.getpagesize() < 200 * RECORD.itemsize
    os.truncate(tmp_path / "run" / STATS, 0)
    assert np.isfinite(run.stats("a", "gamma")).all()


def test_a_run_in_the_place_of_another(tmp_path):
    path = tmp_path / "run"
    follower = Tail(path)
    for seed, channels in ((0, 4), (1, 4), (2, 3)):
        info = layer("bn", channels)
        write_run(path, [info], [story(info, 5 + seed, seed)], probes=probe_values([2], 3, channels))
        check_same(follower.refresh(), path)
        path.rename(tmp_path / f"old-{seed}")
        assert follower.refresh() is None
        assert follower.stamp() is None


def test_arms_that_appear_one_by_one(tmp_path):
    path, info = tmp_path / "experiment", layer("bn", 3)
    follower = Tail(path)
    write_run(path, arms=["learned", "none", "later"], status="running", meta={"data": "digits"})
    assert follower.refresh().arms == {}
    stamps = [follower.stamp()]
    for arm, layers in (("learned", [info]), ("none", [])):
        write_run(path / arm, layers, [story(info, 6)] if layers else [])
        check_same(follower.refresh(), path)
        stamps.append(follower.stamp())
    (path / "results.json").write_text('{"arms": {"learned": {"test_accuracy": 0.9}}}')
    stamps.append(follower.stamp())
    assert all(one != other for k, one in enumerate(stamps) for other in stamps[:k])
    assert follower.refresh().results["arms"]["learned"]["test_accuracy"] == 0.9
    (path / "later").mkdir()
    (path / "later" / "run.json").write_text("[")
    check_same(follower.refresh(), path)


@pytest.mark.parametrize("spoil", [lambda path: path.mkdir(), lambda path: os.mkfifo(path)], ids=["folder", "pipe"])
def test_odd_files_are_named(tmp_path, spoil):
    writer = Writer(tmp_path / "run", 0)
    for name in (STATS, SCALARS):
        spoil(tmp_path / "run" / name)
    check_same(Tail(tmp_path / "run").refresh(), tmp_path / "run")
    writer.kill()


def test_what_is_no_run_is_refused_until_it_is_one(tmp_path):
    path = tmp_path / "run"
    path.mkdir()
    (path / "run.json").write_text('{"format": 9}')
    follower = Tail(path)
    for look in (follower.refresh, follower.stamp):
        with pytest.raises(ValueError, match="format must be 1"):
            look()
    (path / "run.json").write_text('{"format": 1}')
    assert follower.refresh().status == "running"
