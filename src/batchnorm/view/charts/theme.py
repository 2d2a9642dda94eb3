"""Colors and line styles: blue is measured, vermilion is learned, gray dashes are tracked, green is a gradient.

Charts name a style ("measured-dot"), never a color; `config` turns a palette into Vega-Lite's configuration, so one
chart serves light, dark, paper and screen. The colors are Okabe and Ito's, which readers with any color vision can
tell apart; dots, dashes and solid lines say the same again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Palette:
    """The colors of one appearance of the page."""

    measured: str
    learned: str
    gradient: str
    tracked: str
    other: str
    text: str
    muted: str
    line: str
    surface: str
    background: str


LIGHT = Palette(
    measured="#0072B2",
    learned="#D55E00",
    gradient="#009E73",
    tracked="#5A6068",
    other="#CC79A7",
    text="#1B1F24",
    muted="#59616B",
    line="#DDE1E6",
    surface="#FFFFFF",
    background="#F6F7F9",
)
DARK = Palette(
    measured="#56B4E9",
    learned="#E69F00",
    gradient="#2FBF93",
    tracked="#AEB6C0",
    other="#CC79A7",
    text="#E8EBEF",
    muted="#A3ACB7",
    line="#323840",
    surface="#171B20",
    background="#0F1216",
)

# px: a picture is laid out with this machine's font, and may be shown with a wider one.
PADDING = {"left": 32, "right": 24, "top": 8, "bottom": 8}
FONT = "system-ui, -apple-system, 'Segoe UI', 'Liberation Sans', sans-serif"


def config(palette: Palette) -> dict[str, Any]:
    """Return Vega-Lite's `config` for a palette: the styles that every chart here names."""
    style: dict[str, Any] = {
        "cursor": {"color": palette.muted, "strokeWidth": 1},
        "level": {"color": palette.muted, "strokeWidth": 1, "strokeDash": [2, 3]},
        "tracked": {"color": palette.tracked, "strokeWidth": 1.5, "strokeDash": [5, 3]},
        "tracked-band": {"color": palette.tracked, "opacity": 0.25},
        "own-dot": {"color": palette.other, "size": 14, "opacity": 0.9},
        "pairs": {"color": palette.text, "opacity": 0.7, "thickness": 1.2},
        "over": {"color": palette.text, "dy": -20, "fontWeight": "bold", "fontSize": 12},
        "strip": {"fill": palette.muted, "font": FONT, "fontSize": 11, "fontWeight": "normal"},
        "logged-line": {"color": palette.text, "strokeWidth": 1.5},
        "dead-zone": {"color": palette.muted, "opacity": 0.25},
        "channel": {"color": palette.learned, "filled": False, "strokeWidth": 1.6},
        "chance": {"strokeWidth": 6, "opacity": 0.3},
        "push": {"color": palette.gradient, "fontWeight": "bold", "dx": 12, "baseline": "middle"},
        "would-reach": {"color": palette.text, "strokeWidth": 2, "strokeDash": [4, 3]},
        "would-now": {"color": palette.text, "filled": False, "opacity": 1, "size": 70},
        "broken-cell": {"color": palette.text, "strokeWidth": 1.5, "shape": "M-1,-1L1,1M-1,1L1,-1", "size": 50},
        "broken": {"color": palette.text, "strokeWidth": 1.5, "shape": "cross", "size": 40},
    }
    for role in ("measured", "learned", "gradient", "tracked"):
        style[f"{role}-cell"] = {"color": getattr(palette, role)}
    for role in ("measured", "learned", "gradient"):
        color = getattr(palette, role)
        style |= {
            f"{role}-ribbon": {"color": color, "opacity": 0.2},
            f"{role}-band": {"color": color, "opacity": 0.35},
            f"{role}-line": {"color": color, "strokeWidth": 2},
            f"{role}-dot": {"color": color, "size": 9, "opacity": 0.9},
            f"{role}-reach": {"color": color, "strokeWidth": 3},
            f"{role}-now": {"color": color, "filled": True, "opacity": 1, "size": 90},
        }
    style["gradient-line"] |= {"strokeWidth": 1.2}
    text = {"labelColor": palette.muted, "titleColor": palette.muted}
    return {
        "background": None,
        "font": FONT,
        "style": style,
        "view": {"stroke": None},
        "axis": {
            **text,
            "grid": True,
            "gridColor": palette.line,
            "domain": False,
            "ticks": False,
            "labelPadding": 6,
            "labelFontSize": 11,
            "titleFontSize": 11,
            "titleFontWeight": "normal",
            "tickCount": 5,
        },
        "axisY": {"minExtent": 40},  # the panels' left edges agree
        "axisX": {"grid": False, "domain": True, "domainColor": palette.line},
        "header": {**text, "labelColor": palette.text, "labelFontSize": 11, "labelLimit": 190},
        "legend": {
            **text,
            "orient": "top",
            "title": None,
            "labelFontSize": 12,
            "symbolType": "stroke",
            "symbolSize": 300,
            "symbolStrokeWidth": 2.5,
        },
        "text": {"fill": palette.text, "fontSize": 12},
        "title": {
            "color": palette.text,
            "subtitleColor": palette.muted,
            "anchor": "start",
            "fontSize": 15,
            "subtitleFontSize": 12,
            "offset": 12,
        },
        "range": {"category": [palette.learned, palette.tracked, palette.other, palette.text]},
    }
