"""The `batchnorm` command. What a command needs is imported inside it, so that reading a run never imports torch."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from ._version import __version__

if TYPE_CHECKING:
    from .runs import Run

app = typer.Typer(
    help="Batch normalization: train, record, and see what is measured and what is learned.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

RunPath = Annotated[
    Path, typer.Argument(metavar="RUN", help="Folder of a run, or its name in the folder runs.", show_default=False)
]
_ROOT = Path("runs")
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]


def fail(message: object, status: int = 1) -> NoReturn:
    """End the command with one line on stderr and that exit status."""
    complain(message)
    raise typer.Exit(status)


def complain(message: object) -> None:
    """Print one line on stderr."""
    print(f"batchnorm: {' '.join(str(message).split())}", file=sys.stderr)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn the error of a wrong path or a missing extra into one line; a traceback would not help the user."""
    try:
        yield
    except (OSError, ValueError, ModuleNotFoundError) as error:
        fail(error)


def folder_of(run: Path) -> Path:
    """Return the folder of a run, given by its path or by its name in the default folder for runs.

    Raises FileNotFoundError if there is none: a mistyped path and a folder without a run are different mistakes.
    """
    from .runs.schema import RUN

    for path in (run, _ROOT / run):
        if (path / RUN).exists():
            return path
    if run.exists():
        return run
    raise FileNotFoundError(f"there is no folder {run}; batchnorm list ROOT names the runs in a folder")


def _folder_to_come(run: Path) -> Path:
    """Return the folder as `folder_of` finds it; if it does not exist yet, the one that the path names."""
    try:
        return folder_of(run)
    except FileNotFoundError:
        complain(f"no run in {run.absolute()} yet; waiting for one. Press Ctrl-C to stop.")
        return run


def print_json(value: Any) -> None:
    """Print a JSON document. The value must not contain NaN or infinity, which JSON does not have."""
    print(json.dumps(value, indent=2, allow_nan=False))


def _version(wanted: bool) -> None:
    if wanted:
        print(f"batchnorm {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Batch normalization: train, record, and see what is measured and what is learned."""


@app.command()
def train(
    data: Annotated[
        str | None,
        typer.Option(
            help="digits, mnist5k, or a file or folder: IDX, CIFAR-10 .bin, .npz, .csv.", show_default="digits"
        ),
    ] = None,
    experiment: Annotated[
        str | None,
        typer.Option(
            help="all: every parameter learns. gamma-beta: only gamma and beta learn; every weight stays random. "
            "paper: section 4.1 of Ioffe & Szegedy 2015, with and without batch norm.",
            show_default="all, then gamma-beta",
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(help="mlp or cnn.", show_default="mlp")] = None,
    arms: Annotated[
        str | None,
        typer.Option(
            help="Any of learned, fixed, per-batch, none, separated by commas.",
            show_default="all four; gamma-beta: all but none; paper: learned,none",
        ),
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training data.", show_default="60")] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            help="Instead of --epochs; tested a hundred times.", show_default="paper: 3000 (the paper: 50000)"
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            help="Samples per step. The last batch of an epoch may be smaller; a single remaining sample joins the "
            "batch before it, since batch norm cannot train on one.",
            show_default="60",
        ),
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option(
            help="Learning rate of the first step. It falls to 0; with paper it stays constant.",
            show_default="sgd 0.1, adam 0.003; gamma-beta: 0.5, 0.02",
        ),
    ] = None,
    optimizer: Annotated[
        str | None, typer.Option(help="sgd (momentum 0.9; paper: 0) or adam.", show_default="sgd; gamma-beta: adam")
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Seed of the initial weights and the batches, the same in every arm.", show_default="0"),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="New folder for the run.", show_default="runs/<data>-<model>-<time>")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Continue a run that was stopped.", show_default=False)
    ] = None,
    sync: Annotated[
        bool,
        typer.Option("--sync", help="Train on all the processes of torchrun --nproc-per-node N -m batchnorm train."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train a network with batch norm learned, fixed, one pair per batch, and without; record it; write its page."""
    options = {"data": data, "model": model, "epochs": epochs, "batch_size": batch_size, "lr": lr, "seed": seed}
    options |= {
        "steps": steps,
        "experiment": experiment,
        "optimizer": optimizer,
        "arms": tuple(arms.replace(" ", "").split(",")) if arms is not None else None,
    }
    with one_line_errors():
        from .lab.command import train as run_training
        from .lab.errors import LabError

        given = {name: value for name, value in options.items() if value is not None}
        try:
            status = run_training(given, out, resume, as_json, sync)
        except LabError as error:
            fail(error, 2)
    raise typer.Exit(status)


@app.command("list")
def list_(
    root: Annotated[Path, typer.Argument(help="Folder that holds runs.")] = _ROOT,
    as_json: AsJson = False,
) -> None:
    """List the runs in a folder, newest first."""
    from .runs import list_runs
    from .view import terminal
    from .view.facts import brief

    with one_line_errors():
        if not root.is_dir():
            raise FileNotFoundError(f"there is no folder {root}; name the folder that holds runs: batchnorm list ROOT")
        refused: list[str] = []
        runs = list_runs(root, refused)
        for line in refused:
            complain(line)
        if as_json:
            print_json([brief(run) for run in runs])
        else:
            terminal.list_(runs, root)


@app.command()
def show(run: RunPath, as_json: AsJson = False) -> None:
    """Show what a run recorded: its layers, gamma and beta, and values that were not finite."""
    from .runs import open_run
    from .view import terminal
    from .view.facts import facts

    with one_line_errors():
        opened = open_run(folder_of(run))
        if as_json:
            print_json(facts(opened))
        else:
            terminal.show(opened)


@app.command()
def report(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="RUN...",
            help="Folder of a run, or its name in the folder runs. Several: side by side on one page.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="The file to write.", show_default="RUN/report.html; several: side-by-side.html beside the first"
        ),
    ] = None,
    png: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write the main chart as a PNG.", show_default=False)
    ] = None,
    format: Annotated[
        str, typer.Option(help="html; or markdown: one screen for a pull request, printed unless --out is given.")
    ] = "html",
    sample: Annotated[
        bool,
        typer.Option("--sample", help="Show a recorded training that comes with the package: batchnorm-sample.html."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write the page of a run: one HTML file that opens offline."""
    from .reporting import report as write_page
    from .runs import open_run

    if sample == bool(runs):
        fail("--sample shows the package's own run: leave RUN out" if sample else "name a RUN, or --sample", 2)
    if format not in ("html", "markdown"):
        fail(f"--format must be html or markdown, got {format!r}", 2)
    if runs and len(runs) > 1 and (png or format != "html"):
        fail(f"{'--png' if png else '--format markdown'} shows one run, got {len(runs)}", 2)
    with one_line_errors():
        if png is not None and png.suffix.lower() != ".png":
            cure = f"--png {png.with_suffix('.png')}"
            raise ValueError(f"--png writes a PNG, so FILE must end in .png, got {png}: {cure}")
        if sample:
            from .view.sample import open_sample

            opened = [open_sample()]
        else:
            opened = [open_run(folder_of(run)) for run in runs or ()]
        written: dict[str, str] = {}
        if format == "markdown":
            written["markdown"] = _markdown(opened[0], out)
        else:
            page = out or (Path("batchnorm-sample.html") if sample else None)
            written["report"] = str(write_page(opened, page))
        if png is not None:
            from .view.picture import write_png

            written["png"] = str(write_png(opened[0], png))
    if as_json:
        print_json(written)
    else:
        print("\n".join(written.values()))


def _markdown(run: Run, out: Path | None) -> str:
    """Return the run in Markdown, with the findings of diagnose; with `out`, write it there and return that path."""
    from .diagnosis import diagnose as find
    from .diagnosis.terminal import told
    from .runs.files import write_atomically
    from .view.markdown import markdown

    said = markdown(run, [told(finding) for finding in find(run)])
    if out is None:
        return said.rstrip()
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, said.encode())
    return str(out)


@app.command()
def serve(
    run: RunPath,
    port: Annotated[int, typer.Option(help="Port on 127.0.0.1.", show_default="any free port")] = 0,
) -> None:
    """Serve the page of a run on this machine, updated while the run is written; Ctrl-C stops it.

    The address contains a secret, a new one each time. Set BATCHNORM_TOKEN=SECRET and --port to keep it the same.
    """
    with one_line_errors():
        from .view.live import serve as serve_page

        serve_page(_folder_to_come(run), port, partial(print, flush=True))


@app.command()
def tail(
    run: RunPath,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Keep following after the run has ended: it may be resumed.")
    ] = False,
) -> None:
    """Follow a run in the terminal while it is written: its layers and findings. Ends when the run ends."""

    def find(opened: Any) -> list[tuple[str, tuple[str, ...], str]]:
        from .diagnosis import diagnose as judge

        return [(f"{each.severity}: {each.rule}", each.layers, each.evidence) for each in judge(opened)]

    with one_line_errors():
        from .view.follow import follow as follow_run

        try:
            with suppress(BrokenPipeError):  # the reader has closed the pipe
                follow_run(_folder_to_come(run), find, follow)
        except KeyboardInterrupt:
            raise typer.Exit(130) from None


@app.command()
def diagnose(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN|CHECKPOINT...",
            help="Folder of a run, a .safetensors file, or a .pt state_dict. Several: judged one by one, and as ranks.",
            show_default=False,
        ),
    ],
    as_json: AsJson = False,
) -> None:
    """Find what is wrong with batch normalization. Exit status 1: a serious finding; 2: nothing could be judged."""
    try:
        from .diagnosis import diagnose as find
        from .diagnosis import terminal

        findings = find(paths[0] if len(paths) == 1 else paths)
        with suppress(BrokenPipeError, SystemExit):  # the reader has closed the pipe: rich would exit with 1
            if as_json:
                print_json(findings.to_dict())
            else:
                terminal.show(findings)
    except (OSError, ValueError, ModuleNotFoundError) as error:
        fail(error, 2)
    except Exception as error:  # Python's own exit status, 1, says that something serious was found
        fail(f"{', '.join(map(str, paths))} could not be judged: {type(error).__name__}: {error}", 2)
    raise typer.Exit(1 if findings.serious else 2 if findings.judged.nothing else 0)


@app.command()
def summary(
    checkpoint: Annotated[
        Path,
        typer.Argument(help="A .safetensors file, or a state_dict saved as .pt.", show_default=False),
    ],
    as_json: AsJson = False,
) -> None:
    """Show the batch norms in a checkpoint: names, channels, batches tracked. A checkpoint has no eps and momentum."""
    with one_line_errors():
        from .diagnosis.checkpoint import read_checkpoint
        from .model.summary import Row, Summary
        from .view import terminal

        layers = read_checkpoint(checkpoint)
        rows = []
        for layer in layers:
            has = [said for said, vector in (("gamma", layer.gamma), ("beta", layer.beta)) if vector is not None]
            learned = ", ".join(has) or "nothing"
            rows.append(Row(layer.name, None, layer.channels, None, None, learned, layer.updates))
        table = Summary(rows)
        if as_json:
            print_json(table.to_dict())
        else:
            to = terminal.console()
            terminal.say(to, table.headline)
            columns = [terminal.Column(name, right=name in table._numbers) for name in table._columns]
            terminal.rows(to, columns, table._cells())


@app.command()
def export(
    run: RunPath,
    out: Annotated[Path, typer.Option(help="New or empty folder for the files.", show_default=False)],
    format: Annotated[str, typer.Option(help="parquet, arrow, csv or tensorboard.")] = "parquet",
    as_json: AsJson = False,
) -> None:
    """Write what a run recorded as Parquet, Arrow, CSV or TensorBoard files."""
    from .runs import open_run
    from .runs.export import export as write_export

    with one_line_errors():
        written = str(write_export(open_run(folder_of(run)), out, format))
    if as_json:
        print_json({"export": written})
    else:
        print(written)


@app.command("check-gpu")
def check_gpu(
    out: Annotated[
        Path | None, typer.Option(help="A JSON file to write, which you can send to us.", show_default=False)
    ] = None,
    allow: Annotated[
        bool, typer.Option("--allow", help="If every check passes, switch the kernels on for this kind of GPU.")
    ] = False,
    interpreted: Annotated[
        bool, typer.Option("--interpreted", help="Run on the CPU with Triton's interpreter; takes minutes.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check the GPU kernels on this machine: values, gradients, memory access, same bits. Exit status 2: no GPU."""
    with one_line_errors():
        from .proof.command import NOT_JUDGED, NoGPU
        from .proof.command import check_gpu as run_check

        try:
            status = run_check(out, allow, interpreted, as_json)
        except NoGPU as error:
            fail(error, NOT_JUDGED)
    raise typer.Exit(status)


@app.command()
def bench(
    full: Annotated[bool, typer.Option("--full/--quick", help="Every shape (takes minutes), or a few.")] = False,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads that torch may use.", show_default="torch's own setting")
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(min=0.0, help="Total time of the measurement, roughly.", show_default="10; with --full 300"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Time batch normalization on this machine's CPU against torch's. Each case is first checked against float64."""
    with one_line_errors():
        from .bench.command import bench as run_bench

        run_bench(full, seconds, threads, as_json)
