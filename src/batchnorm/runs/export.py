"""export(): a run in formats that other programs read: Parquet, Arrow, CSV, TensorBoard. Without torch."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from .reader import Run
from .rows import histograms_rows, probes_rows, stats_rows, updates_rows, vectors_rows

FORMATS = ("parquet", "arrow", "csv", "tensorboard")


def export(run: Run, out: str | os.PathLike[str], format: str = "parquet") -> Path:
    """Write a run in a format for other programs, and return the folder.

    parquet, arrow and csv: long tables stats (a row a step, layer and quantity), vectors (a row a channel), probes,
    histograms (a row a bin), updates, scalars and alerts, each in a file of that name. tensorboard: event files; the
    mean over the channels as the scalar bn/<layer>/<quantity>, whole vectors as the histogram
    bn/<layer>/<quantity>/channels, logged numbers by their names.
    Quantities that do not exist have no rows. An experiment's arms go into folders of their names.

    Args:
        run: from `open_run`.
        out: a folder, new or empty.
        format: "parquet", "arrow", "csv" or "tensorboard".

    Raises:
        ValueError: no such format. FileExistsError: `out` is not empty. Both are raised before anything is written.
        ModuleNotFoundError: the extra "export" is not installed.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"out must be a new or an empty folder, but {out} holds something: name another")
    write = _write_events if format == "tensorboard" else _write_tables
    existed = out.is_dir()
    out.mkdir(parents=True, exist_ok=True)
    try:
        for name, arm in (run.arms or {"": run}).items():
            write(arm, out / name, format)
    except BaseException:
        shutil.rmtree(out)  # half an export is none
        if existed:
            out.mkdir()
        raise
    return out


def _write_tables(run: Run, out: Path, format: str) -> None:
    try:
        import pyarrow as pa
    except ModuleNotFoundError as error:
        raise _missing(error) from error
    out.mkdir(exist_ok=True)
    tables = {
        "stats": stats_rows(run),
        "vectors": vectors_rows(run),
        "probes": probes_rows(run),
        "histograms": histograms_rows(run),
        "updates": updates_rows(run),
        "scalars": iter([_columns(run.scalars())]),
        "alerts": iter([_columns(run.alerts())]),
    }
    for name, chunks in tables.items():
        writer: Any = None
        for chunk in chunks:
            if not chunk:
                continue
            try:
                table = pa.table(chunk)
            except (pa.ArrowException, OverflowError) as error:
                raise ValueError(f"{run.path}: {name} make no table: {error}") from None
            # Layer by layer: the whole vectors of a long run need not fit into memory twice.
            writer = writer or _table_writer(out / f"{name}.{format}", table.schema, format)
            writer.write_table(table)
        if writer:
            writer.close()


def _table_writer(path: Path, schema: Any, format: str) -> Any:
    if format == "parquet":
        from pyarrow.parquet import ParquetWriter

        return ParquetWriter(path, schema)
    if format == "arrow":
        from pyarrow.ipc import new_file

        return new_file(str(path), schema)
    from pyarrow.csv import CSVWriter

    return CSVWriter(str(path), schema)


def _columns(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Rows with unlike keys as columns, None where a row lacks one."""
    names = {name: None for row in rows for name in row}  # a set that keeps the order
    return {name: [row.get(name) for row in rows] for name in names}


def _write_events(run: Run, out: Path, format: str) -> None:
    try:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter
    except ModuleNotFoundError as error:
        raise _missing(error) from error
    time = _seconds(run.created)
    writer = EventFileWriter(str(out))
    events: Any = event_pb2  # made at run time: type checkers do not see what is in them
    summaries: Any = summary_pb2

    def write(step: int, tag: str, **value: Any) -> None:
        summary = summaries.Summary(value=[summaries.Summary.Value(tag=tag, **value)])
        writer.add_event(events.Event(wall_time=time, step=int(step), summary=summary))

    try:
        for row in run.scalars():
            for name, number in row.items():
                if name != "step" and isinstance(number, (int, float)):
                    with suppress(OverflowError):  # an integer that no float holds
                        write(row["step"], name, simple_value=float(number))
        for chunk in stats_rows(run):
            tag = f"bn/{chunk['layer'][0]}/{chunk['quantity'][0]}"
            for step, mean in zip(chunk["step"], chunk["mean"], strict=True):
                write(step, tag, simple_value=float(mean))
            steps, vectors = run.vectors(chunk["layer"][0], chunk["quantity"][0])
            for step, values in zip(steps, vectors, strict=True):
                finite = values[np.isfinite(values)].astype(np.float64)
                if len(finite):
                    write(step, f"{tag}/channels", histo=summaries.HistogramProto(**_histogram(finite)))
    finally:
        writer.close()


def _seconds(created: str) -> float:
    """Since 1970; 0 of what is no date."""
    try:
        return datetime.fromisoformat(created).timestamp()
    except (ValueError, OverflowError):
        return 0.0


def _histogram(values: np.ndarray) -> dict[str, Any]:
    counts, edges = np.histogram(values, bins=30)
    return {
        "min": values.min(),
        "max": values.max(),
        "num": len(values),
        "sum": values.sum(),
        "sum_squares": np.square(values).sum(),
        "bucket_limit": edges[1:].tolist(),
        "bucket": counts.tolist(),
    }


def _missing(error: ModuleNotFoundError) -> ModuleNotFoundError:
    return ModuleNotFoundError(f"export needs {error.name}: pip install 'batchnorm[export]'", name=error.name)
