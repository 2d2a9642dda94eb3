"""The page's first figures as images, for a reader whose browser runs no JavaScript."""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .select import BANDS, nearest, thin

if TYPE_CHECKING:
    from .select import Selection

# An SVG grows with its points: so few steps of the main chart, so many layers and points in all of the bands.
MOST_STEPS, MOST_LAYERS, MOST_POINTS = 60, 8, 160
LONGEST = 60  # characters of a name
_NOT_XML = re.compile(r"[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True)
class Still:
    """An image: what it shows, in words, and its address, which holds it."""

    said: str
    source: str


def still_specs(selection: Selection, specs: dict[str, Any], look: int) -> dict[str, dict[str, Any]]:
    """Return specifications with data of images of the main chart and the bands, by what they show, in words.

    Args:
        selection: what the page shows.
        specs: those of the page's own charts, without data.
        look: the step at which the page opens.
    """
    from . import charts

    layers = [view for view in selection.layers if view.bands]
    shown = f"the first {MOST_LAYERS} of {len(layers)} layers" if len(layers) > MOST_LAYERS else "every layer"
    main = (
        f"of one channel. The upright line is at step {look:,}; beside it other batches with the weights of that step."
    )
    bands = f"in {shown}: the median of its channels, the middle half and the middle 90 %."
    said = {
        "measured": f"What came in, measured: mean ± standard deviation of each batch, and the running mean, {main}",
        "learned": f"What goes out, learned: β ± |γ| {main}",
        "gamma_bands": f"γ {bands}",
        "beta_bands": f"β {bands}",
    }
    data = {**_main(selection, look), **_bands(selection)}
    # On paper's colors in both themes; without the roles and labels of single marks, which an image cannot use.
    config = charts.config(charts.LIGHT) | {"background": charts.LIGHT.surface, "aria": False}
    return {
        words: specs[name]
        | {"datasets": {source: rows for source, rows in data.items() if source in str(specs[name])}}
        | {"config": config}
        for name, words in said.items()
        if name in specs
    }


def _main(selection: Selection, look: int) -> dict[str, list[dict[str, Any]]]:
    """Return the data of the channel that the page shows first, at fewer steps."""
    if not len(selection.steps):
        return {}
    trace = selection.trace(*selection.first)
    kept = np.union1d(thin(len(trace), MOST_STEPS), nearest(selection.steps, look))
    return {"trace": [trace[s] for s in kept], "probes": selection.probes(*selection.first)}


def _bands(selection: Selection) -> dict[str, list[dict[str, Any]]]:
    """Return the data of the bands, of fewer layers and steps."""
    views = [view for view in selection.layers if view.bands][:MOST_LAYERS]
    names = _drawable([view.info.name for view in views])
    rows = thin(len(selection.band_steps), MOST_POINTS // max(1, len(views)))
    return {
        f"{quantity}_bands": [
            {"step": int(selection.band_steps[t]), "index": i, "layer": names[i]}
            | {p: float(v) if np.isfinite(v) else None for p, v in zip(BANDS, view.bands[quantity][t], strict=True)}
            for i, view in enumerate(views)
            for t in rows[rows < len(selection.band_steps)]
        ]
        for quantity in ("gamma", "beta")
    }


def _drawable(names: list[str]) -> list[str]:
    """Return names that an SVG can hold: short, of XML's characters (vl-convert aborts at others), and still unlike."""
    clean = [_NOT_XML.sub("\ufffd", name[:LONGEST]) for name in names]
    return [name if clean.count(name) == 1 else f"{name} ({i + 1})" for i, name in enumerate(clean)]


def drawn(specs: dict[str, dict[str, Any]]) -> list[Still]:
    """Return the images of specifications with data, by what they show; takes seconds, without Python's lock."""
    import vl_convert

    from .page import VEGA_LITE

    svgs = {said: vl_convert.vegalite_to_svg(spec, vl_version=VEGA_LITE) for said, spec in specs.items()}
    start = "data:image/svg+xml;base64,"
    return [Still(said, start + base64.b64encode(svg.encode()).decode()) for said, svg in svgs.items()]
