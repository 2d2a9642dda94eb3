"""The folder of a run: made, reopened, and marked with how the run ended."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from .._version import __version__
from .files import require_own, write_atomically
from .lock import Lock
from .reader import open_run
from .schema import ALERTS, FORMAT, HISTOGRAMS, OPTIMIZERS, PROBES, RUN, SCALARS, STATS, UPDATES, VECTORS, LayerInfo

_WRITTEN = (RUN, STATS, VECTORS, PROBES, HISTOGRAMS, UPDATES, SCALARS, ALERTS, OPTIMIZERS)


def create_folder(
    log_dir: str | os.PathLike[str] | None,
    layers: Sequence[LayerInfo],
    meta: Mapping[str, Any] | None,
    more: Mapping[str, Any],
) -> Lock:
    """Make the folder of a new run, with its run.json, and hold it.

    Args:
        log_dir: where; None for runs/<date>-<time>.
        layers: the watched ones.
        meta: the user's facts, anything JSON can hold.
        more: our facts beside those of the format.

    Raises:
        FileExistsError: there is a run already, or a file of the name of one of a run's.
        BlockingIOError: another process is making one there.
        ValueError, TypeError: meta is not JSON; nothing has been made then.
    """
    now = datetime.now(timezone.utc)
    path = Path("runs") / now.strftime("%Y%m%d-%H%M%S-%f") if log_dir is None else Path(log_dir)
    path = path.absolute()  # the training may change the working directory
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"log_dir must be a folder, but {path} is a file: name another")
    _refuse_run(path)
    text = _encode(
        {
            "format": FORMAT,
            "batchnorm": __version__,
            **more,
            "created": now.isoformat(timespec="milliseconds"),
            "status": "running",
            "layers": [layer.to_json() for layer in layers],
            "meta": dict(meta or {}),
        }
    )
    path.mkdir(parents=True, exist_ok=True)
    lock = Lock(path)
    _refuse_run(path)  # made by another process since
    write_atomically(path / RUN, text)
    return lock


def _refuse_run(path: Path) -> None:
    if (path / RUN).exists():
        raise FileExistsError(f"{path} holds a run already: name another folder, or continue the run with resume_step=")
    for name in _WRITTEN:
        if os.path.lexists(path / name):
            raise FileExistsError(
                f"{path} holds a {name} already, but no run: name another folder, or move the file away"
            )


def reopen_folder(
    log_dir: str | os.PathLike[str] | None, layers: Sequence[LayerInfo], meta: Mapping[str, Any] | None
) -> Lock:
    """Hold an existing run and mark it as running again; what `meta` says replaces what it said.

    Raises:
        FileNotFoundError: there is no run.
        ValueError: it is a run of other layers.
        BlockingIOError: it is being written.
        FileExistsError: a file of it is a link, or no file.
    """
    if log_dir is None:
        raise ValueError("resume_step needs log_dir, the folder of the run to continue")
    run = open_run(Path(log_dir).absolute())
    before, now = ([(layer.name, layer.channels) for layer in of_run] for of_run in (run.layers, layers))
    if before != now:
        raise ValueError(f"{run.path} is a run with other layers: it has {before}, the model has {now}")
    for name in _WRITTEN:
        require_own(run.path / name)
    lock = Lock(run.path)
    _update(run.path, {"status": "running", "meta": {**run.meta, **(meta or {})}})
    return lock


def end_folder(path: Path, status: str, recorded: Mapping[str, Any]) -> None:
    """Say in run.json how the run ended, and what was recorded of it."""
    _update(path, {"status": status, "recorded": dict(recorded)})


def _update(path: Path, facts: Mapping[str, Any]) -> None:
    write_atomically(path / RUN, _encode({**json.loads((path / RUN).read_bytes()), **facts}))


def _encode(facts: Mapping[str, Any]) -> bytes:
    return json.dumps(facts, indent=2, allow_nan=False).encode()
