"""The README stands on a package index as it does here: its links are absolute, and lead to files that exist."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
FILES = re.compile(
    r"https://(?:github\.com/batchnorm/batchnorm/blob|raw\.githubusercontent\.com/batchnorm/batchnorm)/main/"
)


def targets():
    return [re.sub(r"\s", "", target) for target in re.findall(r"\]\(([^)]+)\)", README)]


def test_every_link_is_absolute():
    assert len(targets()) > 20
    assert [target for target in targets() if not target.startswith("https://")] == []


def test_every_file_that_a_link_leads_to_exists():
    paths = [FILES.sub("", target).partition("#")[0] for target in targets() if FILES.match(target)]
    assert [path for path in paths if not (ROOT / path).is_file()] == []


def test_every_heading_that_the_documentation_leads_to_exists():
    headings = {re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in re.findall(r"(?m)^#+ (.+)$", README)}
    pages = [page.read_text() for page in (ROOT / "docs").rglob("*.md")]
    anchors = {anchor for page in pages for anchor in re.findall(r"README\.md#([\w-]+)", page)}
    assert anchors
    assert anchors <= headings
