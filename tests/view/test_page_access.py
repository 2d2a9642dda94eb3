"""The page is for everybody: axe finds nothing, colors keep their contrast, and paper has no controls."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image
from view.conftest import wait_until

import batchnorm as bn
from batchnorm.view.charts import DARK, LIGHT


@pytest.fixture(scope="module")
def page_path(experiment_path, tmp_path_factory):
    return bn.report(experiment_path, tmp_path_factory.mktemp("access") / "report.html")


@pytest.fixture(scope="module")
def axe():
    """axe-core's script, which the page's own policy does not keep out: it comes by the debugger."""
    import axe_playwright_python

    return next(Path(axe_playwright_python.__file__).parent.rglob("axe.min.js")).read_text(encoding="utf-8")


@pytest.mark.browser
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (390, "light")])
def test_axe_finds_no_violation(open_page, page_path, axe, width, scheme):
    page = open_page(page_path, viewport={"width": width, "height": 800}, color_scheme=scheme, reduced_motion="reduce")
    every = page.locator(".chart:visible").count()  # but for the maps that are not chosen
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    wait_until(page, f"document.querySelectorAll('.chart svg.marks').length === {every}")
    page.evaluate(axe + "; 0")
    found = page.evaluate("axe.run(document).then(r => r.violations.map(v => [v.id, v.nodes.map(n => n.target[0])]))")
    assert found == []
    assert page.evaluate("axe.run(document).then(r => r.passes.length)") > 10


def luminance(color: str) -> float:
    """Relative luminance, WCAG 2.2."""
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("palette", [LIGHT, DARK], ids=["light", "dark"])
def test_contrast_of_what_charts_write_and_draw(palette):
    behind = palette.surface
    for name in ("text", "muted", "tracked"):  # words: 4.5, WCAG 1.4.3
        assert contrast(getattr(palette, name), behind) >= 4.5, name
    for name in ("measured", "learned", "gradient", "other"):  # what is drawn: 3, WCAG 1.4.11
        assert contrast(getattr(palette, name), behind) >= 3, name


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_paper_is_white_has_every_section_and_no_controls(open_page, page_path, scheme):
    page = open_page(page_path, color_scheme=scheme)
    every = page.locator(".chart:visible").count()  # but for the maps that are not chosen
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    wait_until(page, f"document.querySelectorAll('.chart svg.marks').length === {every}")
    assert page.evaluate("getComputedStyle(document.body).color") == "rgb(27, 31, 36)"
    for control in ("#step", "#play", "#next", "#another", "#would-gamma", "#x"):
        assert not page.locator(control).is_visible(), control
    wait_until(
        page,
        "[...document.querySelectorAll('.chart:has(svg)')].every("
        "e => e.querySelector('svg').getBoundingClientRect().width <= e.getBoundingClientRect().width + 1)",
    )
    page.locator("#chart-measured").scroll_into_view_if_needed()
    shot = Image.open(io.BytesIO(page.locator("#chart-measured").screenshot())).convert("L")
    shades = shot.getcolors()
    most = max(shades)[1]
    assert most >= 250, "the ground is white"
    assert min(shade for _, shade in shades) < 120, "words and lines are dark"
