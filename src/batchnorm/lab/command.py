"""What `batchnorm train` does around an experiment: what it says, the page at the end, and how Ctrl-C ends it."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..runs import Run
from ..runs.schema import RUN
from ..view import terminal
from ..view.words import summarize
from .designs import DESIGNS, USUAL
from .errors import LabError
from .experiment import Experiment
from .parallel import joined
from .progress import Progress
from .settings import Settings
from .sources import canonical

PAGE = "report.html"
INTERRUPTED = 130  # what a shell reports of a command ended by Ctrl-C


def train(
    given: dict[str, Any],
    out: Path | None = None,
    resume: Path | None = None,
    as_json: bool = False,
    sync: bool = False,
) -> int:
    """Run or resume an experiment, write its page, print what happened; returns the exit status.

    Args:
        given: the settings that were given, by name; the others have their defaults, or the resumed run's values.
        out: the folder of a new run; None for a name made of data, model and time.
        resume: the folder of the run to go on with.
        as_json: print one JSON object at the end, and nothing else on stdout.
        sync: train on all the processes that torchrun started; the first one prints.
    Raises:
        LabError: a setting or a file that the experiment cannot work with; another process that ended.
    """
    with joined(sync) as ranks:
        if ranks.world > 1 and not resume:
            design = DESIGNS.get(given.get("experiment", USUAL[0]), DESIGNS[USUAL[0]])  # a wrong name is refused below
            arms = tuple(arm for arm in design.arms if arm != "per-batch")
            given = {"arms": arms, **given, "processes": ranks.world}
        return _train(given, out, resume, as_json, is_first=ranks.rank == 0)


def _train(given: dict[str, Any], out: Path | None, resume: Path | None, as_json: bool, is_first: bool) -> int:
    if resume and out and resume.resolve() != out.resolve():
        raise LabError(f"--out {out} contradicts --resume {resume}, which continues in its own folder: drop --out")
    experiments = _resumed(given, resume) if resume else _begun(given, out)
    if not is_first:
        return _train_along(experiments)
    try:
        found = [_run(experiment) for experiment in experiments]
    except KeyboardInterrupt:
        path = shlex.quote(str(experiments[0].path))
        _say_whole(f"interrupted; the recorded steps are in {path}. To continue: batchnorm train --resume {path}")
        return INTERRUPTED
    if as_json:
        run, page = found[0]
        said = {"run": str(run.path), "report": str(page) if page else None, "arms": run.results["arms"]}
        each = {
            str(of.meta.get("experiment", USUAL[0])): {"arms": of.results["arms"], "words": asdict(summarize(of))}
            for of, _ in found
        }
        print(json.dumps({**said, "experiments": each}, allow_nan=False))
    else:
        _report(found[::-1])  # what shows the learning comes first
    return 0


def _report(found: list[tuple[Run, Path | None]]) -> None:
    """Print the first run's plain sentences, then each run's numbers and page."""
    console = terminal.console()
    for line in summarize(found[0][0]).plain:
        terminal.say(console, line)
    for run, page in found:
        console.print()
        terminal.say(console, f"The numbers of {run.path}:")
        for line in summarize(run).numbers:
            terminal.say(console, line, "- ", "  ")
        terminal.say(console, str(page or run.path))


def _begun(given: dict[str, Any], out: Path | None) -> list[Experiment]:
    """The experiment that is asked for; if none is by name, and no arms are, the usual ones, on the same data."""
    first = Experiment.begin(Settings(**given), out)
    if {"experiment", "arms"} & given.keys():
        return [first]
    # Rates and optimizers are of one experiment: another learns something else.
    shared = {name: value for name, value in given.items() if name not in ("lr", "optimizer")}
    others = (Experiment.begin(Settings(**shared, experiment=name), first.path / name) for name in USUAL[1:])
    return [first, *others]


def _resumed(given: dict[str, Any], path: Path) -> list[Experiment]:
    if "data" in given:
        given = {**given, "data": canonical(given["data"])}
    first = Experiment.resume(path, given)
    others = [path / name for name in USUAL[1:]]
    return [first, *(Experiment.resume(other) for other in others if (other / RUN).is_file())]


def _run(experiment: Experiment) -> tuple[Run, Path | None]:
    """The finished run, and its page."""
    _say(f"{experiment.path}: finished already" if experiment.is_finished else _plan(experiment))
    was_finished = experiment.is_finished
    with Progress(experiment.settings.arms) as progress:
        run = experiment.run(progress)
    page = run.path / PAGE
    return run, page if was_finished and page.is_file() else _write_page(run)


def _train_along(experiments: list[Experiment]) -> int:
    """What the other processes do, in silence: the first one reports."""
    try:
        for experiment in experiments:
            experiment.run()
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


def _plan(experiment: Experiment) -> str:
    """What is going to be trained, in one line; says how the samples that do not fill a batch are dealt with."""
    settings, data = experiment.settings, experiment.data
    sizes = [len(batch) for batch in experiment.first_batches()]
    odd = f", the last of {sizes[-1]}" if sizes[-1] != sizes[0] else ""
    what = settings.design.plan.format(model=settings.model)
    return (
        f"{experiment.path}: {what} on {settings.data}, {len(data.y_train)} samples to train on in "
        f"{len(sizes)} batches of {sizes[0]}{odd}, {len(data.y_test)} to test, {len(data.classes)} classes"
        + (f"; on {settings.processes} processes" if settings.processes > 1 else "")
    )


def _write_page(run: Run) -> Path | None:
    """Write report.html into the run; without what it is drawn with, say so and go on."""
    try:
        from ..reporting import report

        return Path(report(run))
    except ModuleNotFoundError:
        path = shlex.quote(str(run.path))
        _say_whole(f"the page needs more packages: pip install 'batchnorm[report]', then batchnorm report {path}")
        return None


def _say(line: str) -> None:
    terminal.say(terminal.console(stderr=True), line)


def _say_whole(line: str) -> None:
    """In one line however narrow the terminal: a command in it is copied."""
    print(line, file=sys.stderr, flush=True)
