"""The documentation's site builds, strictly, and asks no other host for anything."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import batchnorm as bn
from batchnorm import runs

ROOT = Path(__file__).parents[2]
# Elements that load what they name as soon as a page is shown; a link does not.
LOADS = re.compile(r"""<(?:script|img|iframe|link|source)\b[^>]*?\b(?:src|href)=["']?(?:https?:)?//[^"'>\s]+[^>]*>""")
IN_STYLE = re.compile(r"""(?:url\(|@import\s*)["']?(?:https?:)?//""")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs")
    into = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(into)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    return into


pytestmark = [pytest.mark.slow, pytest.mark.processes]


def test_every_public_name_is_in_the_reference(site: Path):
    reference = "".join(page.read_text() for page in (site / "reference").rglob("*.html"))
    named = set(re.findall(r'id="([\w.]+)"', reference))
    wanted = {f"batchnorm.{name}" for name in set(bn.__all__) - {"__version__", "nn"}}
    for room in (bn.nn, runs):  # what the package itself offers too is shown once, by the shorter name
        names = [name for name in room.__all__ if getattr(bn, name, None) is not getattr(room, name)]
        wanted |= {f"{room.__name__}.{name}" for name in names}
    wanted |= {
        f"batchnorm.integrations.{library}.{name}"
        for library in ("lightning", "transformers")
        for name in ("Watch", "Freeze", "Recalibrate")
    }
    missing = sorted(wanted - named)
    assert not missing, missing


def test_nothing_is_loaded_from_another_host(site: Path):
    for page in site.rglob("*.html"):
        found = [match[0] for match in LOADS.finditer(page.read_text()) if 'rel="canonical"' not in match[0]]
        assert not found, (page, found)
    for style in site.rglob("*.css"):
        assert not IN_STYLE.search(style.read_text()), style


def test_the_sample_page_and_the_formulas_need_no_script(site: Path):
    assert "sample.html" in (site / "tutorial" / "index.html").read_text()
    assert "Content-Security-Policy" in (site / "sample.html").read_text()
    formulas = (site / "mathematics" / "index.html").read_text()
    assert formulas.count("<math") > 80
    assert "arithmatex" not in formulas


def test_examples_in_docstrings_are_code(site: Path):
    page = (site / "reference" / "layers" / "index.html").read_text()
    assert "<blockquote>" not in page  # what Markdown makes of ">>>"
    assert page.count('class="gp"') > 6 or page.count("&gt;&gt;&gt;") > 6
