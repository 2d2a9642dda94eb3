"""What every benchmark shares: the line that says where it ran, and the file it writes."""

from __future__ import annotations

import platform
import sys
from datetime import date
from pathlib import Path

import torch


def header(title: str, notes: str) -> list[str]:
    """Title, and a paragraph with the command, the date, the machine and the versions."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    machine = f"{names[0]}, {len(names)} cores" if names else platform.processor()
    command = " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    machine += f" ({torch.backends.cpu.get_cpu_capability()})"
    return [
        f"# {title}",
        "",
        f"`{command}`, {date.today()}: {machine}, torch {torch.__version__}, "
        f"Python {platform.python_version()}, {torch.get_num_threads()} thread(s).",
        notes,
        "",
    ]


def save(name: str, lines: list[str]) -> None:
    """Write the lines to benchmarks/results/<name>.md."""
    (Path(__file__).parent / "results" / f"{name}.md").write_text("\n".join(lines) + "\n")
