"""What `batchnorm check-gpu` does: the whole proof on this machine's GPU, in a table, and in a file to be sent."""

from __future__ import annotations

import json
import os
import platform
import traceback
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from .._version import __version__
from ..ops.gpu import available

RIGHT, WRONG, NOT_JUDGED = 0, 1, 2


@dataclass(frozen=True)
class Checked:
    """One case: which check, what it computes, and what is wrong with it; empty where nothing is."""

    check: str
    case: str
    wrong: str


class NoGPU(RuntimeError):
    """There is nothing to check here."""


def check_gpu(out: Path | None, allow: bool, interpreted: bool, as_json: bool) -> int:
    """Run the proof, print what came out, and return the exit status.

    Args:
        out: a JSON file to write: the machine, and every case.
        allow: where nothing is wrong, add this GPU's architecture and Triton's version to the package's list of those
            on which the kernels are on.
        interpreted: compute on the CPU by Triton's interpreter, which checks the kernels' arithmetic and addresses but
            not what a compiler makes of them.
        as_json: print the file's contents instead of a table.
    Raises:
        NoGPU: there is no GPU, or no Triton, that the kernels could run on.
    """
    if interpreted:
        os.environ["TRITON_INTERPRET"] = "1"  # read where a kernel is decorated
        if available.triton_version() is None:
            raise NoGPU("Triton is not installed: pip install triton")
    else:
        _require_gpu()
    where = _machine(interpreted)
    checked = list(_interpreted() if interpreted else _on_gpu())
    wrong = [each for each in checked if each.wrong]
    report = {"machine": where, "wrong": len(wrong), "checked": [asdict(each) for each in checked]}
    if out is not None:
        out.write_text(json.dumps(report, indent=1) + "\n")
    if as_json:
        print(json.dumps(report, indent=1))
    else:
        _show(where, checked)
    if allow and not wrong and not interpreted:
        _allow(where)
    return WRONG if wrong else RIGHT


def _require_gpu() -> None:
    off = available.why_off(torch.device("cuda", 0))
    if off is not None and available.SWITCH not in off:  # unproved, or switched off: no reason not to check
        raise NoGPU(f"{off}; --interpreted checks the kernels on the CPU with Triton's interpreter")


def _interpreted() -> Iterable[Checked]:
    from .cases import cases

    yield from _values(list(cases()), "cpu")


def _on_gpu() -> Iterable[Checked]:
    from .bits import LARGE, differences
    from .cases import cases

    yield from _values(list(cases()), "cuda")
    small = [case for case in cases() if case.activation.name == "relu" and not case.mask]
    for case in _progress([*LARGE, *small[::4]], "the same bits"):
        yield Checked("bits", str(case), _said(lambda case=case: "; ".join(differences(case)[:3])))


def _values(cases: list[Any], device: str) -> Iterable[Checked]:
    from .values import errors

    def wrong(case: Any) -> str:
        found = [error for error in errors(case, device) if error.is_wrong]
        return "; ".join(f"{e.what}: {e.error:.2e}, allowed {e.allowed:.2e}" for e in found)

    for case in _progress(cases, "values"):
        yield Checked("values", str(case), _said(lambda case=case: wrong(case)))


def _said(check: Any) -> str:
    """What a check says; of one that raises, what it raised: the other cases are checked all the same."""
    try:
        return check()
    except Exception as error:
        return "".join(traceback.format_exception_only(error)).strip()[:1000]


def _progress(cases: list[Any], what: str) -> Iterable[Any]:
    console = Console(stderr=True)
    return track(cases, f"Checking {what}", console=console, transient=True, disable=not console.is_terminal)


def _machine(interpreted: bool) -> dict[str, Any]:
    version = available.triton_version()
    where = {
        "date": str(date.today()),
        "batchnorm": __version__,
        "torch": torch.__version__,
        "triton": f"{version[0]}.{version[1]}" if version else None,
        "python": platform.python_version(),
    }
    if interpreted:
        return {"device": "the CPU, by Triton's interpreter", "architecture": None, **where}
    return {"device": torch.cuda.get_device_name(0), "architecture": available.architecture(0), **where}


def _show(where: dict[str, Any], checked: list[Checked]) -> None:
    console = Console(highlight=False)
    table = Table(
        title=f"{where['device']} {where['architecture'] or ''}, torch {where['torch']}, Triton {where['triton']}"
    )
    for column in ("check", "cases", "wrong"):
        table.add_column(column, justify="left" if column == "check" else "right")
    for check in dict.fromkeys(each.check for each in checked):
        own = [each for each in checked if each.check == check]
        table.add_row(check, str(len(own)), str(sum(bool(each.wrong) for each in own)))
    console.print(table)
    for each in checked:
        if each.wrong:
            console.print(f"{each.check}, {each.case}: {each.wrong}", markup=False, soft_wrap=True)


def _allow(where: dict[str, Any]) -> None:
    pairs = json.loads(available.PROVED.read_text())
    pairs = [
        pair for pair in pairs if (pair["architecture"], pair["triton"]) != (where["architecture"], where["triton"])
    ]
    kept = {key: where[key] for key in ("architecture", "triton", "device", "torch", "batchnorm", "date")}
    available.PROVED.write_text(json.dumps([*pairs, kept], indent=1) + "\n")
