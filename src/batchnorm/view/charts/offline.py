"""Charts that a notebook shows offline, in an exported one too: drawn here, not by scripts from the network."""

from __future__ import annotations

import base64
import html
from typing import Any

import altair as alt


class OfflineChart(alt.HConcatChart):
    """An Altair chart, with its data inside, that a notebook shows as it was drawn here.

    Altair's own charts come as HTML that loads Vega from the network, or carry 0.9 MB of it each. This one comes as an
    SVG picture of some 10 to 200 kB, which every notebook, and one exported to HTML, shows without a script; and as
    Vega-Lite for those that have Vega themselves, as JupyterLab does: there its points tell their numbers. A chart that
    is joined with others by `|` or `&` is Altair's again.
    """

    def to_svg(self) -> str:
        """Return the chart as SVG, whose text is text."""
        import vl_convert

        from ..page import VEGA_LITE

        return vl_convert.vegalite_to_svg(self.to_dict(validate=False), vl_version=VEGA_LITE)

    def _repr_mimebundle_(self, *args: Any, **kwds: Any) -> dict[str, Any]:
        major = alt.SCHEMA_VERSION.lstrip("v").split(".")[0]
        said = " ".join(self._said())
        return {
            f"application/vnd.vegalite.v{major}+json": self.to_dict(validate=False),
            "text/html": picture_html(self.to_svg(), said),
            "text/plain": f"{type(self).__name__}: {said}",
        }

    def _said(self) -> list[str]:
        """What stands above the chart, for those who see text alone."""
        title = self.title
        if not isinstance(title, alt.TitleParams):
            return [str(title)] if isinstance(title, str) else []
        lines = title.subtitle if isinstance(title.subtitle, list) else [title.subtitle]
        return [str(line) for line in (title.text, *lines)]


def picture_html(svg: str, said: str) -> str:
    """Return an SVG as a picture in HTML, no wider than there is room, that says in words what it shows."""
    data = base64.b64encode(svg.encode()).decode()
    return f'<img alt="{html.escape(said)}" style="max-width:100%" src="data:image/svg+xml;base64,{data}">'
