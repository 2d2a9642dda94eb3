"""A training in a process of its own, as test_live.py watches it: no torch, a record every 20th of a second."""

import sys
import time
from pathlib import Path

import numpy as np

from batchnorm.runs.folder import create_folder, end_folder, reopen_folder
from batchnorm.runs.journal import Journal
from batchnorm.runs.lines import Lines
from batchnorm.runs.schema import ALERTS, PROBES, STATS, VECTORS, LayerInfo, stats_dtype

STOP = "stop"  # the name of a file beside the run that ends the training, however fast a machine is
LAYERS = [LayerInfo(name, "BatchNorm1d", 30, 1e-5, 0.1, True, True) for name in ("first", "<b>second</b>")]


def main(path: Path, begin: int, end: int, nan: int = -1) -> None:
    lock = create_folder(path, LAYERS, None, {}) if begin == 0 else reopen_folder(path, LAYERS, None)
    before = None if begin == 0 else begin
    stats, vectors, probes = (Journal(path / name, before) for name in (STATS, VECTORS, PROBES))
    alerts = Lines(path / ALERTS, before)
    for step in range(begin, end):
        if path.with_name(STOP).exists():
            break
        draw = np.random.default_rng(step)
        record = np.zeros((), stats_dtype(LAYERS))
        record["count"], record["forwards"], record["stats"] = 60, 1, 1 + step / 1000
        record["stats"][..., -1] = step == nan
        stats.append([(step, record.tobytes())])
        values = draw.normal(1, 0.2, (2, 8, 30)).astype("<f4")
        values[:, 2] = 1 + np.linspace(0, 1, 30) * (step / 100)  # gamma
        vectors.append([(step, values.tobytes())])
        if step == 5:
            probes.append([(step, draw.normal(1, 0.2, (3, 2, 2, 30)).astype("<f4").tobytes())])
        if step == nan:
            alerts.append([{"step": step, "layer": "first", "quantity": "gamma", "what": "nonfinite", "count": 1}])
        time.sleep(0.05)
    for file in (stats, vectors, probes, alerts):
        file.close()
    end_folder(path, "finished", {"steps": step})
    lock.release()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
