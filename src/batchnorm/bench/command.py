"""What `batchnorm bench` does: times a short list of cases on this machine, and shows them in a table or as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from .._version import __version__
from .problem import Case
from .timing import IMAGES, OTHERS, Result, cases, machine, measure, summarize

SHORT = (
    *cases([(32, 64, 56, 56), (32, 512, 7, 7), (1024, 256)], ["BN+ReLU"], ["forward+backward", "eval"]),
    *cases([(32, 64, 56, 56), (1024, 256)], ["BN"], ["forward+backward"]),
    *cases([(32, 64, 56, 56)], ["BN+add+ReLU"], ["forward+backward"]),
)
SHORT_SECONDS, FULL_SECONDS = 10.0, 300.0
COLUMNS = ("shape", "dtype", "channels", "what", "mode")
WIDTH = 100


def bench(full: bool, seconds: float | None, threads: int | None, as_json: bool) -> None:
    """Time the short or the full list for about `seconds` altogether and print what came out.

    Args:
        full: every shape of ResNet-50 and MobileNetV2 and some others, instead of three.
        seconds: shared out evenly over the cases; each is timed five times in any case.
        threads: how many torch may use; None leaves it as it is.
        as_json: print one JSON object and nothing else.
    Raises:
        WrongResult: a result is further from float64 than rounding takes it.
    """
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads or before)
        chosen = cases(IMAGES + OTHERS) if full else SHORT
        budget = (FULL_SECONDS if full else SHORT_SECONDS) if seconds is None else seconds
        results = list(_measure(chosen, budget))
        where = {"batchnorm": __version__, **machine()}
    finally:
        torch.set_num_threads(before)
    if as_json:
        print(json.dumps(_facts(where, results), allow_nan=False))
    else:
        _show(where, results)


def _measure(chosen: Sequence[Case], seconds: float) -> Iterator[Result]:
    console = Console(stderr=True)
    for case in track(chosen, "Timing", console=console, transient=True, disable=not console.is_terminal):
        yield measure(case, seconds / len(chosen))


def _facts(where: dict[str, str | int], results: Sequence[Result]) -> dict[str, object]:
    entries = [
        {
            **dict(zip(COLUMNS, result.case.words, strict=True)),
            "ours_us": result.ours_us,
            "torch_us": result.eager_us,
            "ratio": result.eager,
        }
        for result in results
    ]
    means = [asdict(entry) for entry in summarize(results)]
    return {"machine": where, "checked_against": "float64", "entries": entries, "geometric_means": means}


def _show(where: dict[str, str | int], results: Sequence[Result]) -> None:
    console = Console(highlight=False)
    console.width = max(console.width, WIDTH)  # a row that is folded is harder to read than one that is wider
    console.print(
        "{processor}, {cores} cores ({capability}), {threads} thread(s); "
        "batchnorm {batchnorm}, torch {torch}, Python {python}".format(**where),
        markup=False,
        soft_wrap=True,  # the name of a processor may be of any length
    )
    entries = _table(*COLUMNS, "ours, µs", "torch, µs", "ratio")
    for result in results:
        numbers = (f"{result.ours_us:,.0f}", f"{result.eager_us:,.0f}", f"{result.eager:.2f}")
        entries.add_row(*result.case.words, *numbers)
    means = _table("dtype", "what", "mode", "geometric mean", "slowest")
    for mean in summarize(results):
        means.add_row(mean.dtype, mean.variant, mean.mode, f"{mean.ratio:.2f}", f"{mean.slowest:.2f}")
    console.print(entries)
    console.print()
    console.print(means)
    console.print()
    console.print(
        "A ratio above 1 is how many times faster this package is than torch: medians of alternating measurements. "
        "Every entry was checked against float64 before it was timed."
    )


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bright_black")
    for name in columns:
        numeric = name.endswith("µs") or name in ("ratio", "geometric mean", "slowest")
        table.add_column(name, justify="right" if numeric else "left", no_wrap=True)
    return table
