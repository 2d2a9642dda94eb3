"""Every notebook in examples/ runs, holds no output, and exported to HTML shows its charts without a network."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbconvert import HTMLExporter

EXAMPLES = Path(__file__).parents[2] / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
# What nbconvert's own template would load from the network: MathJax, and two scripts that widgets need.
OFFLINE = {"mathjax_url": "", "require_js_url": "", "jquery_url": ""}

pytestmark = [pytest.mark.processes, pytest.mark.slow]  # a notebook has a kernel


@pytest.fixture(scope="module", params=NOTEBOOKS, ids=lambda path: path.stem)
def executed(request, tmp_path_factory):
    notebook = nbformat.read(request.param, 4)
    folder = tmp_path_factory.mktemp("notebook")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("TMPDIR", str(folder))  # where the notebook records
        environment.setenv("IPYTHONDIR", str(folder))
        resources = {"metadata": {"path": str(folder)}}
        NotebookClient(notebook, timeout=240, kernel_name="python3", resources=resources).execute()
    return notebook


def outputs(notebook):
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def plots(notebook):
    return sum("run.plot." in cell.source for cell in notebook.cells if cell.cell_type == "code")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_committed_without_outputs(path):
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    assert outputs(notebook) == []
    assert {cell.execution_count for cell in notebook.cells if cell.cell_type == "code"} == {None}


def test_its_outputs_are_what_it_speaks_of(executed):
    assert {output.output_type for output in outputs(executed)} <= {"execute_result", "stream"}, "no error, no warning"
    assert all(output.name == "stdout" for output in outputs(executed) if output.output_type == "stream")
    shown = [output.data.get("text/html", "") for output in outputs(executed) if "data" in output]
    assert sum("<img" in html for html in shown) == plots(executed)
    assert sum("<table" in html for html in shown) >= 3, "summary, run, compare_modes"
    assert not any("<script" in html for html in shown)


def test_exported_it_shows_every_chart_and_asks_the_network_for_nothing(executed, browser, tmp_path):
    path = tmp_path / "notebook.html"
    path.write_text(HTMLExporter(**OFFLINE).from_notebook_node(executed)[0], encoding="utf-8")
    context = browser.new_context(offline=True)
    page = context.new_page()
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(path.as_uri())
    page.wait_for_load_state()
    sizes = page.evaluate("[...document.images].map(image => image.complete ? image.naturalWidth : 0)")
    alts = page.evaluate("[...document.images].map(image => image.alt)")
    context.close()
    assert len(sizes) == plots(executed)
    assert min(sizes) > 300
    assert all("layer" in alt for alt in alts)
    assert [url for url in asked if not url.startswith("data:")] == [path.as_uri()]
    assert path.stat().st_size < 1_500_000


def test_nbconverts_defaults_ask_for_what_they_would_without_our_outputs(executed):
    with_outputs, without = (HTMLExporter().from_notebook_node(nb)[0] for nb in (executed, nbformat.v4.new_notebook()))
    assert with_outputs.count("<script") == without.count("<script")
