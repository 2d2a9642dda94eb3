"""Maps of layers by steps, against loops over the reader's vectors."""

import numpy as np
import pytest
from synthetic import layer, story, write_run

from batchnorm.runs import open_run
from batchnorm.view import charts
from batchnorm.view.heat import MAPS, heat

LAYERS = (layer("z", 6), layer("a", 5, eps=0.1), layer("m", 3, affine=False))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    values = [story(info, 12, seed) for seed, info in enumerate(LAYERS)]
    values[0]["gamma_grad"][3, :2] = np.nan
    values[1]["batch_mean"][5, 0] = np.inf
    values[1]["running_mean"][5:, 0] = np.inf
    return open_run(write_run(tmp_path_factory.mktemp("heat") / "run", LAYERS, values, steps=range(0, 36, 3)))


def finite_median(values):
    kept = [value for value in values if np.isfinite(value)]
    return np.median(kept) if kept else np.nan


@np.errstate(invalid="ignore")
def test_values_are_what_their_names_say(run):
    found = heat(run)
    assert found.layers == ["z", "a", "m"], "model order"
    assert found.steps.tolist() == list(range(0, 36, 3))
    for i, info in enumerate(LAYERS):
        of = {
            q: run.vectors(info.name, q)[1].astype(float) for q in ("batch_mean", "batch_var", "gamma", "running_mean")
        }
        grads = [run.vectors(info.name, q)[1].astype(float) for q in ("gamma_grad", "beta_grad")]
        for t in range(12):
            std = [np.sqrt(variance + info.eps) for variance in of["batch_var"][t]]
            channels = range(info.channels)
            away = [abs(of["running_mean"][t, c] - of["batch_mean"][t, c]) / std[c] for c in channels]
            jumps = [abs(of["batch_mean"][t, c] - of["batch_mean"][t - 1, c]) / std[c] for c in channels]
            pushes = [g for grad in grads for g in grad[t] if np.isfinite(g)]
            expected = {
                "spread": finite_median(jumps) / (np.sqrt(2) * 0.6745) if t else np.nan,
                "gamma": finite_median(abs(of["gamma"][t])),
                "drift": finite_median(away),
                "gradient": np.sqrt(np.mean(np.square(pushes))) if pushes else np.nan,
            }
            told = {name: found.values[name][i, t] for name in MAPS}
            assert told == pytest.approx(expected, rel=1e-12, nan_ok=True)


def test_spread_is_the_standard_deviation_of_normal_batch_means(tmp_path):
    info = layer("bn", 400)
    values = story(info, 40)
    draw = np.random.default_rng(0)
    values["batch_mean"] = draw.normal(5, 0.3, (40, 400)).astype(np.float32)
    values["batch_var"][:] = 4
    found = heat(open_run(write_run(tmp_path / "run", [info], [values])))
    # The median of 400 has a relative standard error of 1.17 / sqrt(400) = 6 % here; the mean of 39 steps, 1 %.
    assert np.nanmean(found.values["spread"]) == pytest.approx(0.3 / 2, rel=0.05)


def test_values_that_are_not_finite_are_counted_in_the_maps_they_are_part_of(run):
    found = heat(run)
    cells = {
        name: {(int(i), int(t)): int(counts[i, t]) for i, t in np.argwhere(counts)}
        for name, counts in found.broken.items()
    }
    # What is tracked averages what was measured, so it stays infinite from there on.
    infinite = {(1, t): 1 for t in range(6, 12)} | {(1, 5): 2}
    assert cells == {"gradient": {(0, 3): 2}, "gamma": {}, "spread": {(1, 5): 1}, "drift": infinite}


def test_long_and_deep_runs_are_thinned_evenly_and_it_is_said(run):
    found = heat(run, max_steps=5, max_layers=2)
    assert found.layers == ["z", "m"]
    assert len(found.steps) == 5
    assert (found.steps[0], found.steps[-1]) == (0, 33)
    whole = heat(run)
    at = np.searchsorted(whole.steps, found.steps)
    for name in MAPS:
        np.testing.assert_array_equal(found.values[name], whole.values[name][[0, 2]][:, at])
    assert [note.split(":")[1].split(",")[0] for note in found.notes] == [
        " 2 of 3",
        " 5 of 12 steps that hold whole vectors",
    ]
    assert whole.notes == []


@pytest.mark.parametrize("quantity", MAPS)
def test_the_chart_has_a_cell_a_layer_and_step_and_a_cross_where_it_broke(run, quantity):
    import altair as alt

    rows = heat(run).rows(quantity)
    assert [(row["layer"], row["step"], row["until"]) for row in rows[-2:]] == [("m", 30, 33), ("m", 33, 36)]
    spec = charts.heat(alt.NamedData("heat"), quantity).to_dict(validate=True)
    cells, crosses, _ = spec["layer"]
    assert cells["mark"]["type"] == "rect"
    assert crosses["transform"][0] == {"filter": "datum.broken > 0"}


def test_runs_with_nothing_to_map(tmp_path):
    assert heat(open_run(write_run(tmp_path / "none"))).layers == []
    info = layer("bn", 2)
    one = heat(open_run(write_run(tmp_path / "one", [info], [story(info, 1)])))
    assert [(row["step"], row["until"]) for row in one.rows("gamma")] == [(0, 1)]
