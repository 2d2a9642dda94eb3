"""run.to_frame(): the run's own statistics in a long table of whichever library, or the cure where there is none."""

import sys

import numpy as np
import pytest
from synthetic import layer, story, write_run

from batchnorm.runs import COLUMNS, open_run

LAYERS = (layer("a", 3), layer("b", 2, affine=False, tracks=False))
LIBRARIES = ["pandas", "polars", "pyarrow"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    values = [story(info, 5, seed) for seed, info in enumerate(LAYERS)]
    values[0]["gamma"][2, 1] = np.nan
    return open_run(write_run(tmp_path_factory.mktemp("frame") / "run", LAYERS, values, steps=[0, 1, 2, 5, 9]))


def columns_of(frame):
    """The frame as lists by column, whatever made it."""
    if type(frame).__module__.startswith("pandas"):
        return frame.to_dict("list")
    return frame.to_dict(as_series=False) if type(frame).__module__.startswith("polars") else frame.to_pydict()


@pytest.mark.parametrize("library", LIBRARIES)
def test_rows_are_the_statistics_of_each_step(run, library):
    frame = run.to_frame(library)
    assert type(frame).__module__.split(".")[0] == library
    told = columns_of(frame)
    assert list(told) == ["step", "layer", "quantity", *COLUMNS, "count", "forwards"]
    keys = list(zip(told["layer"], told["quantity"], strict=True))
    assert {key for key in keys if key[0] == "b"} == {("b", "batch_mean"), ("b", "batch_var")}, "b learns nothing"
    for name, quantity in dict.fromkeys(keys):
        rows = [k for k, key in enumerate(keys) if key == (name, quantity)]
        assert [told["step"][k] for k in rows] == [0, 1, 2, 5, 9]
        found = np.array([[told[column][k] for column in COLUMNS] for k in rows], np.float32)
        np.testing.assert_array_equal(found, run.stats(name, quantity))
        assert {(told["count"][k], told["forwards"][k]) for k in rows} == {(60, 1)}


def test_dtypes_are_the_documented_ones_in_an_empty_run_too(run, tmp_path):
    import polars as pl
    import pyarrow as pa

    numbers = dict.fromkeys(COLUMNS, "float32") | {"step": "int64", "count": "int64", "forwards": "int32"}
    for opened in (run, open_run(write_run(tmp_path / "empty"))):
        pandas = opened.to_frame("pandas").dtypes
        assert {name: str(pandas[name]) for name in numbers} == numbers
        polars = opened.to_frame("polars").schema
        assert {name: str(polars[name]).lower() for name in numbers} == numbers
        assert polars["layer"] == polars["quantity"] == pl.String
        arrow = opened.to_frame("pyarrow").schema
        kinds = {name: str(arrow.field(name).type).replace("float", "float32") for name in numbers}
        assert kinds == numbers
        assert arrow.field("layer").type == arrow.field("quantity").type == pa.string()


def test_an_experiments_arms_are_a_column(tmp_path):
    path = write_run(tmp_path / "experiment", arms=["learned", "fixed", "none"])
    for seed, arm in enumerate(("learned", "fixed")):
        write_run(path / arm, LAYERS[:1], [story(LAYERS[0], 4, seed)])
    write_run(path / "none")
    run = open_run(path)
    frame = run.to_frame()
    assert frame.columns[0] == "arm"
    assert set(frame["arm"]) == {"learned", "fixed"}, "the arm none has no layer"
    rows = frame[(frame["arm"] == "fixed") & (frame["quantity"] == "beta")]
    np.testing.assert_array_equal(rows["p95"], run.arms["fixed"].stats("a", "beta")[:, COLUMNS.index("p95")])


def test_the_first_library_that_is_installed(run, monkeypatch):
    for name in LIBRARIES:
        assert type(run.to_frame()).__module__.split(".")[0] == name
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    with pytest.raises(ModuleNotFoundError, match=r"pandas or polars or pyarrow.*pip install pandas"):
        run.to_frame()
    with pytest.raises(ModuleNotFoundError, match="table of polars, which is not installed: pip install polars"):
        run.to_frame("polars")
    with pytest.raises(ValueError, match="one of pandas, polars, pyarrow, got 'excel'"):
        run.to_frame("excel")
