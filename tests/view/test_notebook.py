"""What a notebook shows: runs and findings as tables whose names are text, charts that need no network."""

import base64
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from synthetic import layer, story, write_run
from torch import nn

import batchnorm as bn
from batchnorm.diagnosis import Finding, Findings
from batchnorm.runs import open_run

EVIL = "<img src=x onerror=alert(1)></td><script>alert(2)</script>&amp;"


class Seen(HTMLParser):
    """The tags of a piece of HTML, and the text between them."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.tags, self.text = [], ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += f"{data} "


def seen(shown):
    html = shown._repr_html_()
    found = Seen(html)
    assert {tag for tag, _ in found.tags} <= {"p", "table", "thead", "tbody", "tr", "th", "td"}
    assert "color" not in html, "a notebook's ground may be light or dark"
    return found


def test_a_run_shows_its_state_and_its_layers(run_path, experiment_path, tmp_path):
    run = open_run(run_path)
    text = seen(run).text
    last = run.stats("net.bn2", "gamma")[-1]
    for words in ("finished", "30 recorded steps", "net.bn1", f"1 → {last[3]:.3g} [{last[1]:.3g}, {last[5]:.3g}]"):
        assert words in text
    text = seen(open_run(experiment_path)).text
    assert "per-batch" in text
    assert "90.00%" in text
    info = layer(EVIL, 2)
    values = story(info, 4)
    values["gamma"][2:] = np.nan
    text = seen(open_run(write_run(tmp_path / "run", [info], [values]))).text
    assert text.count(EVIL) == 2, "in the table, and in the line on what was not finite"
    assert "1 → NaN" in text


def test_many_layers_are_counted(tmp_path):
    infos = [layer(f"bn{i}", 2) for i in range(65)]
    values = story(infos[0], 3)
    text = seen(open_run(write_run(tmp_path / "run", infos, [values] * 65))).text
    assert "bn59" in text
    assert "bn60" not in text
    assert "and 5 more layers" in text


def test_findings_are_tables():
    finding = Finding("rule", EVIL, "serious", "0 < 1 & 2", 7, "with x:\n    pass", 0.9)
    for shown in (finding, Findings([finding])):
        found = seen(shown)
        for words in ("1 finding: 1 serious", f"{EVIL}, since step 7", "0 < 1 & 2", "with x:\n    pass"):
            assert words in found.text
    assert "Judged: 0 layers" in seen(Findings([finding])).text
    assert "0 findings." in seen(Findings()).text


def test_comparisons_and_recalibrations_are_tables_with_what_they_print():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    batches = [(torch.randn(8, 3), torch.randn(8, 1)) for _ in range(2)]
    for shown in (bn.recalibrate(model, batches), bn.compare_modes(model, batches, nn.functional.mse_loss)):
        printed = str(shown).split()
        assert seen(shown).text.split() == printed
        assert "recalibrated" in printed


def shown_data(chart, name="trace"):
    return chart.to_dict(validate=True)["datasets"][name]


@pytest.mark.parametrize("plot", ["measured", "learned", "running", "gradients", "main"])
def test_plots_hold_the_channels_own_numbers_and_need_no_network(run_path, plot):
    run = open_run(run_path)
    chart = getattr(run.plot, plot)("net.bn2", 1)
    for quantity in ("batch_mean", "gamma", "running_var", "beta_grad"):
        shown = [row[quantity] for row in shown_data(chart)]
        assert shown == run.vectors("net.bn2", quantity)[1][:, 1].tolist()
    bundle = chart._repr_mimebundle_()
    assert re.fullmatch(r"application/vnd\.vegalite\.v\d\+json", next(iter(bundle)))
    ((tag, attributes),) = Seen(bundle["text/html"]).tags
    assert tag == "img"
    assert "layer net.bn2, channel 1" in attributes["alt"]
    kind, data = attributes["src"].split(",")
    assert kind == "data:image/svg+xml;base64"
    svg = base64.b64decode(data).decode()
    assert svg.startswith("<svg")
    assert "net.bn2" in svg
    assert not re.findall(r"<script|<foreignObject|href=", svg)


def test_plots_without_a_layer_are_of_the_pages_first_channel(run_path):
    from batchnorm.view.select import select

    run = open_run(run_path)
    selection = select(run)
    view = selection.layers[selection.first[0]]
    expected = run.vectors(view.info.name, "beta")[1][:, view.channels[selection.first[1]]].tolist()
    assert [row["beta"] for row in shown_data(run.plot.learned())] == expected
    assert [row["beta"] for row in shown_data(run.plot.learned(view.info.name))] == expected


def test_names_in_charts_are_text(tmp_path):
    info = layer(EVIL, 2)
    run = open_run(write_run(tmp_path / "run", [info], [story(info, 4)]))
    for chart in (run.plot.learned(), run.plot.health()):
        assert [tag for tag, _ in Seen(chart._repr_mimebundle_()["text/html"]).tags] == ["img"]
        assert "script" not in [tag for tag, _ in Seen(chart.to_svg()).tags]


def test_health_draws_the_map_asked_for(run_path):
    from batchnorm.view.heat import heat

    run = open_run(run_path)
    for quantity in ("drift", "gamma"):
        assert shown_data(run.plot.health(quantity), "heat") == heat(run).rows(quantity)
    with pytest.raises(ValueError, match="one of spread, gamma, drift, gradient, got 'loss'"):
        run.plot.health("loss")


def test_what_cannot_be_drawn_is_said(tmp_path, monkeypatch):
    infos = [layer("plain", 2, affine=False, tracks=False), layer("bn", 2)]
    run = open_run(write_run(tmp_path / "run", infos, [story(info, 4) for info in infos]))
    with pytest.raises(ValueError, match="no layer 'x'"):
        run.plot.learned("x")
    with pytest.raises(ValueError, match="no channel 2 of a layer 'bn'"):
        run.plot.measured("bn", 2)
    for plot in (run.plot.learned, run.plot.gradients):
        with pytest.raises(ValueError, match=r"'plain' .* affine=False"):
            plot("plain")
    with pytest.raises(ValueError, match=r"'plain' .* tracks none"):
        run.plot.running("plain")
    empty = open_run(write_run(tmp_path / "empty"))
    for plot in (empty.plot.learned, empty.plot.health):
        with pytest.raises(ValueError, match="nothing to draw"):
            plot()
    monkeypatch.setattr("batchnorm.view.page.find_spec", lambda name: None)
    for plot in (run.plot.learned, run.plot.health):
        with pytest.raises(ModuleNotFoundError, match=r"batchnorm\[report\]"):
            plot()
