"""The page: one self-contained report.html, opened from disk, that asks the network for nothing."""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runs.files import write_atomically
from .facts import BELOW, NEAR_ZERO, alert_lines, arm_results, damage_lines, extent, plural, spoken, test_samples
from .judgement import Judgement, health
from .paper import paper_charts, paper_rows
from .payload import first_look, payload
from .sections import Below, below
from .select import Selection, select

if TYPE_CHECKING:
    from ..runs.reader import Run
    from .stills import Still

VEGA_LITE = "6.4"
TEMPLATES = Path(__file__).parent / "templates"
SCRIPTS = (
    "data.js",
    "charts.js",
    "table.js",
    "whatif.js",
    "player.js",
    "findings.js",
    "logged.js",
    "strip.js",
    "shares.js",
    "worked.js",
    "heat.js",
    "histograms.js",
    "page.js",
)


def report(run: Run, out: str | os.PathLike[str] | None = None, judgement: Judgement | None = None) -> Path:
    """Write the page of a run, with what was found in it, and return where it is.

    Args:
        run: a run from `open_run`.
        out: the file to write; RUN/report.html if not given. It appears whole or not at all.
        judgement: what was found in the run; None if nobody judged it.
    Raises:
        IsADirectoryError: `out` is a folder.
        PermissionError: the page must not be written there.
        ModuleNotFoundError: Altair or vl-convert is not installed (`pip install "batchnorm[report]"`).
    """
    require_charts()
    path = Path(out) if out is not None else run.path / "report.html"
    return write_page(path, lambda: render(run, judgement))


def write_page(path: Path, content: Callable[[], str]) -> Path:
    """Write a page, whole or not at all, and return where it is."""
    if path.is_dir():
        cure = f"name a file: --out {path / 'report.html'}"
        raise IsADirectoryError(f"the page is one file, but {path} is a folder; {cure}")
    made = content().encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, made)
    except PermissionError as error:
        raise PermissionError(f"no permission to write {path}; choose another file with --out FILE") from error
    return path


def require_charts() -> None:
    """Raise with the cure where what draws the charts is not installed."""
    for module, name in (("altair", "Altair"), ("vl_convert", "vl-convert")):
        if find_spec(module) is None:
            message = f'the page is drawn with {name}, which is not installed: pip install "batchnorm[report]"'
            raise ModuleNotFoundError(message, name=module)


@cache
def vega_bundle() -> str:
    """Return Vega, Vega-Lite and Vega-Embed with Vega's expression interpreter as one script (0.9 MB)."""
    import vl_convert

    script = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=VEGA_LITE)
    return script.replace("</script", "<\\/script")


def render(run: Run, judgement: Judgement | None = None) -> str:
    """Return the page of a run as HTML."""
    with ThreadPoolExecutor(1) as pool:
        bundle = pool.submit(vega_bundle)  # takes seconds, without Python's lock: the rest is made meanwhile
        from .stills import drawn, still_specs

        selection = select(run)
        look, _ = first_look(selection)
        sections = below(run, selection, look)
        specs = chart_specs(run, selection) | sections.specs()
        stills = pool.submit(drawn, still_specs(selection, specs, look))
        data = payload(run, selection) | sections.payload() | {"specs": specs}
        worn = dress([bundle.result(), own_script(*SCRIPTS)])
        return markup(run, selection, sections, specs, judgement=judgement, stills=stills.result(), data=data, **worn)


def own_script(*names: str) -> str:
    """Return scripts of ours as one."""
    return "\n".join((TEMPLATES / name).read_text(encoding="utf-8") for name in names)


def dress(scripts: Sequence[str], connects: bool = False) -> dict[str, Any]:
    """Return what a page wears: its style, its scripts, and the policy that lets it have these and no others.

    Args:
        scripts: what it runs.
        connects: whether it asks the server that it came from; else it asks nobody.
    """
    style = stylesheet()
    # Each in a scope of its own: the bundle's names are short, many, and change with its version.
    scripts = [f'(() => {{\n"use strict";\n{script}\n}})();' for script in scripts]
    return {"style": style, "scripts": scripts, "policy": policy(style, scripts, connects)}


def markup(
    run: Run,
    selection: Selection,
    sections: Below,
    specs: dict[str, Any],
    *,
    judgement: Judgement | None = None,
    stills: Sequence[Still] = (),
    live: str | None = None,
    **worn: Any,
) -> str:
    """Return the page's HTML.

    Args:
        run: what it is about.
        selection: what of it the first screen shows.
        sections: what is shown below that.
        specs: its charts.
        judgement: what was found in the run; None if nobody judged it.
        stills: images for a browser without JavaScript.
        live: how the training goes, on a page that renews itself.
        worn: what `dress` returns, and the page's data; may be left out where a page wears them already.
    """
    naked = {"policy": "", "style": "", "scripts": [], "data": {}}
    told = {
        "run": run,
        "main": selection.run,
        "live": live,
        "health": health(run, judgement),
        "judgement": judgement,
        "below": sections,
        "stills": stills,
        "NEAR_ZERO": NEAR_ZERO,
        "BELOW": BELOW,
        "places": {info.name: i for i, info in enumerate(selection.run.layers)},
        "MANY": 100,
        "alerts": alert_lines(run),
        "words": _words(run),
        "notes": selection.notes + sections.heat.notes,
        "damage": damage_lines(run),
        "specs": specs,
        "selection": selection,
        "arms": list(arm_results(run)),
        "plural": plural,
        "extent": extent,
        "spoken": spoken,
        "samples": test_samples(run),
    }
    return environment().get_template("report.html").render(naked | told | worn)


def chart_specs(run: Run, selection: Selection) -> dict[str, dict[str, Any]]:
    """Return the Vega-Lite specification of every chart of the page, without data: the page fills in the rows."""
    import altair as alt

    from . import charts

    trace, probes = alt.NamedData("trace"), alt.NamedData("probes") if len(selection.probe_steps) else None
    parameters = charts.parameters(*first_look(selection))
    step, learns = parameters[0], any(view.bands for view in selection.layers)
    made: dict[str, Any] = {}
    if len(selection.steps):
        made["measured"] = charts.measured(trace, probes).add_params(*parameters)
        made["learned"] = charts.learned(trace, probes).add_params(*parameters)
        made["running_mean"] = charts.running_mean(trace).add_params(step)
        made["running_variance"] = charts.running_variance(trace).add_params(step)
        if learns:
            made["gamma_grad"] = charts.gradients(trace, "gamma_grad").add_params(step)
            made["beta_grad"] = charts.gradients(trace, "beta_grad").add_params(step)
        if any("own_gamma" in view.columns for view in selection.layers):
            made["owned_gamma"] = charts.owned(trace, "gamma").add_params(step)
            made["owned_beta"] = charts.owned(trace, "beta").add_params(step)
    if len(selection.band_steps) and learns:
        for quantity in ("gamma", "beta"):
            name = f"{quantity}_bands"
            made[name] = charts.bands(alt.NamedData(name), quantity).add_params(step)
    if arm_results(run):
        made["arms_curves"] = charts.arms_curves(alt.NamedData("curves"))
        made["arms_final"] = charts.arms_final(alt.NamedData("final"), alt.NamedData("pairs"))
    if figures := paper_rows(run):
        made |= paper_charts(figures)
    return {name: chart.to_dict(validate=False) for name, chart in made.items()}


def _words(run: Run) -> list[str]:
    from .words import summarize

    return summarize(run).plain[:3]


def policy(style: str, scripts: Sequence[str] = (), connects: bool = False) -> str:
    """Return the Content-Security-Policy that allows this style and these scripts, and nothing else."""
    parts = {
        "default-src": "'none'",
        "script-src": " ".join(map(_hash, scripts)) or "'none'",
        "style-src": _hash(style),
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    if connects:
        parts["connect-src"] = "'self'"
    return "; ".join(f"{name} {allowed}" for name, allowed in parts.items())


def stylesheet() -> str:
    """Return the page's style, with the colors of both palettes."""
    from . import charts

    palettes = {"light": charts.LIGHT, "dark": charts.DARK}
    return environment().get_template("page.css").render(palettes=palettes, font=charts.FONT)


def _hash(content: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


@cache
def environment() -> Any:
    """Return the environment of the page's templates, in which all that is filled in is text."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    # Names of layers and all else in a run come from outside: autoescape makes them text.
    return Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True)
