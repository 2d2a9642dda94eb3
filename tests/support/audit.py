"""What a binary asks of others: PyTorch's stable C functions since 2.10, and nothing of Python. Else it fails.

python tests/support/audit.py WHEEL...
"""

from __future__ import annotations

import re
import sys
import tempfile
import zipfile
from pathlib import Path

from torch_abi_audit import inspect_extension
from torch_abi_audit.symbols import extract_undefined_symbols

OLDEST = "2.10.0"
FORBIDDEN = re.compile(r"_?Py[A-Z_]|.*\b(at|c10|torch)::")  # Python's C API; PyTorch's C++, which changes


def audit(package: Path) -> str:
    """What the binary of an unpacked package uses; an AssertionError tells what it should not."""
    binary = inspect_extension(package / "_C.so")
    assert binary.error is None, binary.error
    torch = binary.torch
    wrong = [symbol for symbol in extract_undefined_symbols(binary.path) if FORBIDDEN.match(symbol)]
    assert not wrong, f"the binary should use neither Python nor PyTorch's C++, but asks for {', '.join(wrong)}"
    assert torch.uses_torch, "the binary should use PyTorch's stable functions, but none was found in it"
    assert torch.stable, f"not of PyTorch's stable ABI: {', '.join(torch.unstable_symbols)}"
    assert not torch.unknown_shim_symbols, f"not known as stable: {', '.join(torch.unknown_shim_symbols)}"
    assert torch.min_torch_version == OLDEST, f"the binary needs torch {torch.min_torch_version}, not {OLDEST}"
    return f"{torch.stable_shim_count} stable functions of torch >= {torch.min_torch_version}, none of Python"


def main(wheels: list[str]) -> None:
    for wheel in map(Path, wheels):
        with tempfile.TemporaryDirectory() as folder:
            zipfile.ZipFile(wheel).extractall(folder)
            pure = wheel.stem.endswith("-py3-none-any")
            assert pure or "-py3-none-" in wheel.name, f"{wheel.name} should be a wheel for every Python"
            assert pure != (Path(folder) / "batchnorm" / "_C.so").exists(), f"{wheel.name} is named for the other kind"
            print(f"{wheel.name}: {'pure Python' if pure else audit(Path(folder) / 'batchnorm')}")


if __name__ == "__main__":
    main(sys.argv[1:])
