"""How long a wheel takes to install, and the package to import; writes results/install.md.

python benchmarks/install.py WHEEL...        (make wheel runs it)

A new environment for each wheel gets all that it requires but torch, which a user has, downloads included.
"""

from __future__ import annotations

import re
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from importlib.metadata import requires
from pathlib import Path

from common import header, save

ROUNDS = 21


def seconds(*command: str | Path) -> float:
    """How long the command takes."""
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def installed(wheel: Path, python: Path) -> tuple[float, float]:
    """Seconds of pip for the wheel, and for what it requires."""
    pip = python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"
    needed = [r for r in requires("batchnorm") or () if "extra ==" not in r and not re.match(r"torch\b", r)]
    return seconds(*pip, "--no-deps", wheel), seconds(*pip, *needed)


def importing(python: Path) -> float:
    """Milliseconds that `import batchnorm` adds to a Python that does nothing: the median of pairs, run in turns."""
    torch = subprocess.run([python, "-c", "import sys, batchnorm; sys.exit('torch' in sys.modules)"], check=False)
    assert torch.returncode == 0, "import batchnorm should not import torch"
    pairs = [(seconds(python, "-c", "import batchnorm"), seconds(python, "-c", "pass")) for _ in range(ROUNDS)]
    return 1000 * statistics.median(with_it - without for with_it, without in pairs)


def main(wheels: list[str]) -> None:
    lines = header("Installing", "pip, and `import batchnorm` beside an empty program (the median of 21 pairs).")
    lines += ["| wheel | size, MB | pip, s | what it requires, s | import, ms |", "|---|---|---|---|---|"]
    for wheel in map(Path, wheels):
        with tempfile.TemporaryDirectory() as folder:
            venv.create(folder, with_pip=True)
            python = Path(folder) / "bin" / "python"
            own, needed = installed(wheel, python)
            cells = f"{wheel.stat().st_size / 1e6:.2f}", f"{own:.1f}", f"{needed:.1f}", f"{importing(python):.0f}"
        kind = wheel.stem.split("-", 2)[2]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    print("\n".join(lines))
    save("install", lines)


if __name__ == "__main__":
    main(sys.argv[1:])
