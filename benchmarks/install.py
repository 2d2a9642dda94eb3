"""How long a wheel takes to install, and the package to import; writes results/install.md.

python benchmarks/install.py WHEEL...        (make wheel runs it)

A new environment for each wheel gets all that it requires but torch, which a user has, downloads included.
"""

from __future__ import annotations

import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from importlib.metadata import requires
from pathlib import Path
from typing import NamedTuple

from common import header, save

ROUNDS = 21
NOTES = (
    "In an environment of its own, without torch, downloads included; in brackets the seconds of computing. `import "
    f"batchnorm` beside a program that does nothing: computing, the median of {ROUNDS} pairs."
)


class Cost(NamedTuple):
    """Seconds by the clock, and seconds of computing, which a busy machine does not stretch."""

    clock: float
    cpu: float

    def __str__(self) -> str:
        return f"{self.clock:.1f} ({self.cpu:.1f})"


def cost(*command: str | Path) -> Cost:
    """What the command takes."""
    clock, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return Cost(time.perf_counter() - clock, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def installed(wheel: Path, python: Path) -> tuple[Cost, Cost]:
    """Of pip: for what the wheel requires, and for itself."""
    pip = python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"
    needed = [r for r in requires("batchnorm") or () if "extra ==" not in r and not re.match(r"torch\b", r)]
    return cost(*pip, *needed), cost(*pip, "--no-deps", wheel)


def importing(python: Path) -> float:
    """Milliseconds of computing that `import batchnorm` adds to a Python that does nothing: the median of pairs."""
    torch = subprocess.run([python, "-c", "import sys, batchnorm; sys.exit('torch' in sys.modules)"], check=False)
    assert torch.returncode == 0, "import batchnorm should not import torch"
    pairs = [(cost(python, "-c", "import batchnorm"), cost(python, "-c", "pass")) for _ in range(ROUNDS)]
    return 1000 * statistics.median(with_it.cpu - without.cpu for with_it, without in pairs)


def main(wheels: list[str]) -> None:
    lines = header("Installing", NOTES)
    lines += [
        "| wheel | size, MB | pip: what it requires, s | pip: the wheel, s | import, ms |",
        "|---|---|---|---|---|",
    ]
    for wheel in map(Path, wheels):
        with tempfile.TemporaryDirectory() as folder:
            venv.create(folder, with_pip=True)
            python = Path(folder) / "bin" / "python"
            needed, own = installed(wheel, python)
            cells = f"{wheel.stat().st_size / 1e6:.2f}", str(needed), str(own), f"{importing(python):.0f}"
        kind = wheel.stem.split("-", 2)[2]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    print("\n".join(lines))
    save("install", lines)


if __name__ == "__main__":
    main(sys.argv[1:])
