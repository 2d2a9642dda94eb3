"""Charts are valid Vega-Lite, hold the run's numbers, and their colors can be told from the ground."""

import math

import pytest

from batchnorm.runs import open_run
from batchnorm.view import charts, main_chart
from batchnorm.view.page import chart_specs
from batchnorm.view.picture import write_png
from batchnorm.view.select import select


def luminance(color):
    """WCAG 2's relative luminance."""
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one, other):
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def mixed(one, other, share):
    """CSS color-mix(in srgb, one share, other), as page.css writes words."""
    parts = [(int(one[i : i + 2], 16), int(other[i : i + 2], 16)) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(share * a + (1 - share) * b):02x}" for a, b in parts)


def test_contrast_of_black_on_white_is_21():
    assert math.isclose(contrast("#000000", "#ffffff"), 21)


@pytest.mark.parametrize("palette", [charts.LIGHT, charts.DARK], ids=["light", "dark"])
def test_colors_reach_the_contrast_that_wcag_asks_for(palette):
    for ground in (palette.surface, palette.background):
        for words in (palette.text, palette.muted, palette.tracked):
            assert contrast(words, ground) >= 4.5
        for role in (palette.measured, palette.learned, palette.gradient):
            assert contrast(role, ground) >= 3
            assert contrast(mixed(role, palette.text, 0.75), ground) >= 4.5


@pytest.mark.slow
def test_every_chart_is_valid_vega_lite(run_path, experiment_path):
    import altair as alt

    trace, probes = alt.NamedData("trace"), alt.NamedData("probes")
    step = charts.parameters(0, 0)[0]
    for chart in (
        charts.measured(trace, probes),
        charts.learned(trace),
        charts.running_mean(trace).add_params(step),
        charts.running_variance(trace),
        charts.gradients(trace, "gamma_grad"),
        charts.owned(trace, "beta"),
        charts.bands(alt.NamedData("rows"), "beta").add_params(step),
        charts.arms_curves(alt.NamedData("curves")),
        charts.arms_final(alt.NamedData("final"), alt.NamedData("pairs")),
    ):
        chart.to_dict(validate=True)
    assert {"measured", "learned", "gamma_bands"} <= set(chart_specs(open_run(run_path), select(open_run(run_path))))
    run = open_run(experiment_path)
    assert {"arms_curves", "arms_final"} <= set(chart_specs(run, select(run)))


@pytest.mark.slow
def test_the_main_chart_carries_the_numbers_of_the_channel_asked_for(run_path):
    run = open_run(run_path)
    spec = main_chart(run, "net.bn2", 1).to_dict(validate=True)
    assert spec["title"]["text"] == "Each batch is measured. Gamma and beta are learned."
    for quantity in ("batch_mean", "batch_var", "gamma", "beta", "running_var", "beta_grad"):
        shown = [row[quantity] for row in spec["datasets"]["trace"]]
        assert shown == run.vectors("net.bn2", quantity)[1][:, 1].tolist()
    shown = [row["batch_var"] for row in spec["datasets"]["probes"]]
    assert shown == run.probes("net.bn2", "batch_var")[1][:, :, 1].ravel().tolist()
    with pytest.raises(ValueError, match="no channel 3"):
        main_chart(run, "net.bn2", 3)


@pytest.mark.slow
def test_png_shows_measured_blue_and_learned_vermilion(run_path, tmp_path):
    from PIL import Image

    with Image.open(write_png(open_run(run_path), tmp_path / "new" / "main.png", scale=1)) as image:
        pixels = image.convert("RGB")
    assert pixels.width > 1000
    count = dict.fromkeys((charts.LIGHT.measured, charts.LIGHT.learned), 0)
    halves = {}
    for half, box in (
        ("left", (0, 0, pixels.width // 2, pixels.height)),
        ("right", (pixels.width // 2, 0, *pixels.size)),
    ):
        colors = pixels.crop(box).getcolors(pixels.width * pixels.height)
        found = {"#" + bytes(color).hex().upper(): n for n, color in colors}
        halves[half] = {color: found.get(color, 0) for color in count}
    assert halves["left"][charts.LIGHT.measured] > 100
    assert halves["right"][charts.LIGHT.learned] > 100
    assert halves["left"][charts.LIGHT.learned] == halves["right"][charts.LIGHT.measured] == 0
