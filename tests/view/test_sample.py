"""The sample in the package: whole, small, and shown by one command; and the script that makes it."""

from pathlib import Path

import numpy as np
import sample as maker
from synthetic import layer, probe_values, story, write_run
from typer.testing import CliRunner
from view.test_side_by_side import logged

from batchnorm.cli import app
from batchnorm.runs import QUANTITIES, open_run
from batchnorm.view.sample import FOLDER, open_sample


def test_the_sample_holds_what_the_page_can_show():
    run = open_sample()
    assert (run.status, run.damage) == ("finished", [])
    assert list(run.arms) == ["learned", "fixed", "per-batch"]
    accuracy = {name: result["test_accuracy"] for name, result in run.results["arms"].items()}
    assert accuracy["learned"] > accuracy["fixed"] + 0.5, "gamma and beta alone have learned"
    main = run.main
    name = main.layers[-1].name
    assert len(main.vectors(name, "gamma")[0]) == len(main.steps) >= 25
    assert len(main.probes(name, "batch_mean")[0]) >= 3
    assert main.scalars()
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= maker.MOST_BYTES
    assert {path.suffix for path in files} <= {".json", ".jsonl", ".bin"}


def test_one_command_shows_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["report", "--sample"])
    assert (result.exit_code, result.stdout) == (0, "batchnorm-sample.html\n")
    html = (tmp_path / "batchnorm-sample.html").read_text(encoding="utf-8")
    assert FOLDER.name in html
    assert "Nothing else learned here" in html


def test_the_script_keeps_evenly_spaced_records_as_they_were(tmp_path):
    info = layer("bn", 3)
    path = write_run(tmp_path / "run", arms=["learned", "fixed"], results={"arms": {"learned": {"steps": 100}}})
    for seed, arm in enumerate(("learned", "fixed")):
        probes = probe_values(range(0, 100, 10), 2, 3)
        write_run(path / arm, [info], [story(info, 100, seed)], probes=probes)
        logged(path / arm, loss=list(range(100)))
        (path / arm / "checkpoint.pt").write_bytes(b"weights")
        (path / arm / "later.bin").write_bytes(b"what a later recorder writes")
    maker.make(open_run(path), tmp_path / "made")
    made, whole = open_run(tmp_path / "made"), open_run(path)
    assert made.damage == []
    assert made.results == whole.results
    for name, vectors, probed in (("learned", maker.STEPS, maker.PROBED), ("fixed", 6, 0)):
        kept, arm = made.arms[name], whole.arms[name]
        assert len(kept.steps) == maker.STEPS
        assert (kept.steps[0], kept.steps[-1]) == (0, 99)
        for quantity in QUANTITIES:
            np.testing.assert_array_equal(kept.stats("bn", quantity), arm.stats("bn", quantity)[kept.steps])
            steps, values = kept.vectors("bn", quantity)
            assert len(steps) == vectors
            np.testing.assert_array_equal(values, arm.vectors("bn", quantity)[1][steps])
        # The recorder probes ever more rarely, so the last ones are spread over the run.
        assert kept.probes("bn", "batch_var")[0].tolist() == list(range(100 - 10 * probed, 100, 10))
        assert [row["loss"] for row in kept.scalars()] == [row["step"] for row in kept.scalars()]
        assert len(kept.scalars()) == maker.STEPS
        assert {file.name for file in Path(kept.path).iterdir()} >= {"later.bin", "run.json"}
        assert not (kept.path / "checkpoint.pt").exists()
