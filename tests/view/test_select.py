"""What the page shows is what was recorded: the very numbers, evenly thinned, the channel that moved most first."""

import numpy as np
import pytest
from synthetic import layer, probe_values, story, write_run
from view.conftest import LAYERS

from batchnorm.runs import QUANTITIES, open_run
from batchnorm.view import select as selecting
from batchnorm.view.select import select, thin


def test_thin_keeps_both_ends_and_even_gaps():
    assert thin(5, 10).tolist() == [0, 1, 2, 3, 4]
    assert thin(101, 11).tolist() == list(range(0, 101, 10))
    assert thin(1, 10).tolist() == [0]
    assert thin(0, 10).tolist() == []


def test_columns_are_the_recorded_vectors(run_path):
    run = open_run(run_path)
    selection = select(run)
    assert selection.steps.tolist() == run.steps.tolist()
    for view in selection.layers:
        for quantity in QUANTITIES:
            whole = run.vectors(view.info.name, quantity)[1]
            np.testing.assert_array_equal(view.columns[quantity], whole[:, view.channels])
        for quantity in ("batch_mean", "batch_var"):
            whole = run.probes(view.info.name, quantity)[1]
            np.testing.assert_array_equal(view.probes[quantity], whole[:, :, view.channels])
    assert selection.probe_steps.tolist() == [10, 50]
    assert selection.notes == []  # nothing was left out


def test_channels_come_in_the_order_of_their_way(run_path):
    run = open_run(run_path)
    selection = select(run)
    ways = {}
    for info in LAYERS:
        gamma, beta = (run.vectors(info.name, quantity)[1].astype(np.float64) for quantity in ("gamma", "beta"))
        ways[info.name] = np.sqrt((gamma[-1] - gamma[0]) ** 2 + (beta[-1] - beta[0]) ** 2)
    for view in selection.layers:
        assert view.channels.tolist() == np.argsort(-ways[view.info.name]).tolist()


@pytest.mark.slow
def test_a_large_run_is_thinned_within_the_budget_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(selecting, "TRACE_VALUES", 4000)
    monkeypatch.setattr(selecting, "BAND_VALUES", 2000)
    layers = [layer(f"bn{i}", 40) for i in range(5)]
    path = write_run(
        tmp_path / "run",
        layers,
        [story(info, 400, i) for i, info in enumerate(layers)],
        vectors_every=2,
        probes=probe_values([101], 3, 200),
    )
    run = open_run(path)
    selection = select(run)
    values = sum(column.size for view in selection.layers for column in view.columns.values())
    assert values <= 4000 + 5 * 8 * 2  # and the one step nearest to the probe
    assert {0, 398} <= set(selection.steps.tolist()) <= set(range(0, 400, 2))
    assert {100, 102} & set(selection.steps.tolist()), "the slider can stop where the probe was taken"
    said = " ".join(selection.notes)
    assert f"{len(selection.band_steps)} of 400" in said
    assert f"{len(selection.steps)} of 200" in said
    assert "200 of 400" in said
    assert "channels" in said.lower()
    # Still recorded numbers, not averages.
    view = selection.layers[3]
    steps, gamma = run.vectors("bn3", "gamma")
    np.testing.assert_array_equal(view.columns["gamma"], gamma[np.isin(steps, selection.steps)][:, view.channels])
    np.testing.assert_array_equal(
        view.bands["gamma"], run.stats("bn3", "gamma")[np.isin(run.steps, selection.band_steps)][:, 1:6]
    )


def test_what_is_not_finite_is_told_from_what_is_not_there(tmp_path):
    infos = [layer("bn", 2), layer("plain", 2, affine=False, tracks=False)]
    values = [story(info, 6) for info in infos]
    values[0]["batch_mean"][3, 0] = np.inf
    values[0]["beta_grad"][0] = np.nan
    selection = select(open_run(write_run(tmp_path / "run", infos, values)))
    place = selection.layers[0].channels.tolist().index(0)
    rows = selection.trace(0, place)
    assert [row["broken"] for row in rows] == ["gradient", "", "", "measured", "", ""]
    assert rows[3]["batch_mean"] is None
    assert rows[2]["batch_mean"] == values[0]["batch_mean"][2, 0]
    assert [row["broken"] for row in selection.trace(0, 1 - place)] == ["gradient", "", "", "", "", ""]
    assert [row["broken"] for row in selection.trace(1, 0)] == [""] * 6
    assert selection.layers[1].bands == {}


def test_the_first_channel_both_jumps_and_moves(tmp_path):
    infos = [layer("still", 3), layer("both", 3), layer("far", 3)]
    values = [story(info, 40, 5) for info in infos]
    values[0]["gamma"][:] = 1  # its batches jump, it learns nothing
    values[0]["beta"][:] = 0
    values[1]["beta"][:, 2] *= 10  # of the middle layer, channel 2 learns most
    values[2]["batch_mean"][:] = 0.5  # it learns most, its batches are all alike
    values[2]["gamma"][-1] = 10
    selection = select(open_run(write_run(tmp_path / "run", infos, values)))
    first, place = selection.first
    assert (first, selection.layers[first].channels[place]) == (1, 2)


def test_a_layer_without_affine_is_not_looked_at_first(tmp_path):
    infos = [layer("plain", 2, affine=False), layer("bn", 2)]
    run = open_run(write_run(tmp_path / "run", infos, [story(info, 6) for info in infos]))
    assert select(run).first[0] == 1


def test_one_channel_can_be_had_alone(run_path):
    run = open_run(run_path)
    selection = select(run, ("net.bn2", 2))
    assert [view.info.name for view in selection.layers] == ["net.bn2"]
    np.testing.assert_array_equal(selection.layers[0].columns["beta"][:, 0], run.vectors("net.bn2", "beta")[1][:, 2])
    for wrong in (("net.bn2", 3), ("net.bn2", -1), ("bn", 0)):
        with pytest.raises(ValueError, match=r"net\.bn1 \(4 channels\), net\.bn2 \(3 channels\)"):
            select(run, wrong)


@pytest.mark.parametrize("cut", ["stats-0001.bin", "vectors-0001.bin"])
def test_a_torn_file_leaves_the_steps_that_both_files_hold(tmp_path, cut):
    info = layer("bn", 3)
    path = write_run(tmp_path / "run", [info], [story(info, 10)])
    whole = (path / cut).read_bytes()
    (path / cut).write_bytes(whole[: len(whole) // 2])
    run = open_run(path)
    selection = select(run)
    assert 0 < len(selection.steps) < 10
    assert selection.steps.tolist() == list(range(len(selection.steps)))
    (path / cut).write_bytes(b"")
    assert select(open_run(path)).steps.size == 0
