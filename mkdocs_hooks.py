"""What the site needs beside docs/: pages that are kept elsewhere, links that hold in both places, formulas.

A link in a page is relative to the file, so that it holds on GitHub. On the site it leads to the page that shows that
file or, where none does, to the file on GitHub. A link to a file that does not exist is a warning; strict mode fails.
"""

from __future__ import annotations

import html
import logging
import re
from pathlib import Path
from posixpath import relpath
from typing import TYPE_CHECKING, Any

import griffe

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent
ON_GITHUB = "https://github.com/batchnorm/batchnorm/blob/main/"
KEPT_ELSEWHERE = ["CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "benchmarks/results/*.md"]
LINK = re.compile(r"(?<=\]\()(?!https?:|mailto:|#)([^)#\s]+)(#[^)\s]*)?(?=\))")
FORMULA = re.compile(r'<(?:span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</(?:span|div)>', re.DOTALL)
log = logging.getLogger("mkdocs.hooks")


class Examples(griffe.Extension):
    """Docstrings head their examples with "Example:"; griffe shows as code what is below "Examples:"."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = re.sub(r"(?m)^( *)Example:$", r"\1Examples:", obj.docstring.value)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Puts every page of results under Benchmarks."""
    for section in config.nav or []:
        if "Benchmarks" in section:
            results = sorted(path.name for path in (ROOT / "benchmarks" / "results").glob("*.md"))
            section["Benchmarks"] += [f"benchmarks/results/{name}" for name in results]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages kept elsewhere, and the page of the sample run, made now by the package itself."""
    from mkdocs.structure.files import File

    import batchnorm as bn
    from batchnorm.view.sample import open_sample

    for pattern in KEPT_ELSEWHERE:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path)))
    sample = Path(bn.report(open_sample(), out=ROOT / "build" / "docs" / "sample.html"))
    files.append(File.generated(config, "sample.html", abs_src_path=str(sample)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Leads every relative link to what the site shows of that file."""
    here = page.file.src_uri
    source = Path(page.file.abs_src_path or ROOT / "docs" / here)
    shown = {Path(file.abs_src_path).resolve(): file.src_uri for file in files if file.abs_src_path}

    def lead(link: re.Match[str]) -> str:
        target, anchor = (source.parent / link[1]).resolve(), link[2] or ""
        if target in shown:
            return relpath(shown[target], Path(here).parent.as_posix()) + anchor
        if link[1].endswith("sample.html"):  # made by on_files
            return link[0]
        if not (target.exists() and target.is_relative_to(ROOT)):
            log.warning("%s: the link %s leads to no file", source.relative_to(ROOT), link[1])
        return ON_GITHUB + target.relative_to(ROOT).as_posix() + anchor

    # Links in code are text.
    parts = re.split(r"(^```.*?^```|`[^`\n]+`)", markdown, flags=re.DOTALL | re.MULTILINE)
    return "".join(part if at % 2 else LINK.sub(lead, part) for at, part in enumerate(parts))


def on_page_content(content: str, **_: Any) -> str:
    """Formulas as MathML, which browsers show without a script."""
    if "arithmatex" not in content:
        return content
    from latex2mathml.converter import convert

    def formula(found: re.Match[str]) -> str:
        return convert(html.unescape(found[2]).strip(), display="inline" if found[1] == "(" else "block")

    return FORMULA.sub(formula, content)
