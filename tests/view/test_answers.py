"""What learners ask: every number in an answer is computed here once more, from the run, by another route."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
from synthetic import layer, probe_values, story, write_run
from view.test_report import Page

import batchnorm as bn
from batchnorm.runs import open_run
from batchnorm.view.answers import answers, number
from batchnorm.view.look import look_at
from batchnorm.view.payload import first_look
from batchnorm.view.select import select

STEPS, BATCHES = 30, 6


def said(path):
    """The answers by the first words of their questions, and the place they are about."""
    run = open_run(path)
    selection = select(run)
    look = look_at(selection, first_look(selection)[0])
    return {answer.question: answer.here for answer in answers(run.main, look)}, look


def about(found, words):
    (here,) = [here for question, here in found.items() if words in question]
    return here


def figures(text):
    """The numbers of a sentence, as they are written."""
    return [
        float(each.replace("−", "-").replace(",", "")) for each in re.findall(r"−?[\d,]*\.?\d+(?:e[−+]?\d+)?", text)
    ]


def near(value):
    return pytest.approx(value, rel=6e-3)  # three digits are written


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    infos = [layer("a", 4, eps=1e-3, momentum=0.2), layer("b", 3, affine=False)]
    values = [story(info, STEPS, seed) for seed, info in enumerate(infos)]
    probes = probe_values([10, 22], BATCHES, 7)
    return write_run(tmp_path_factory.mktemp("answers") / "run", infos, values, probes=probes)


@pytest.fixture(scope="module")
def told(path):
    return said(path)


@pytest.fixture(scope="module")
def raw(path, told):
    """The recorded values of the place, read straight from the run."""
    run, look = open_run(path), told[1]
    at = run.steps.tolist().index(look.step)
    return {q: run.vectors("a", q)[1][:, look.channel].astype(float) for q in bn.runs.QUANTITIES}, at


def test_eval_against_train_is_this_batch_and_the_average(path, told, raw):
    columns, at = raw
    run, look = open_run(path), told[1]
    assert look.step == 22
    (probe,) = np.flatnonzero(run.probes("a", "batch_mean")[0] == 22)
    others = run.probes("a", "batch_mean")[1][probe, :, look.channel].astype(float)
    batch, running, usual = columns["batch_mean"][at], columns["running_mean"][at], sum(others) / len(others)
    std = (columns["batch_var"][at] + 1e-3) ** 0.5
    pairs = ((running, batch), (usual, batch), (running, usual))
    away, unlike, lag = (abs(x - y) / std for x, y in pairs)
    out = np.interp(batch, *_line(columns, at))
    here = about(told[0], "Which mean does eval use").split("step 22", 1)[1]
    beta = columns["beta"][at]
    assert figures(here) == [near(x) for x in (batch, running, away, batch, beta, out, BATCHES, usual, unlike, lag)]
    assert re.findall("above|below", here) == ["above" if x > y else "below" for x, y in pairs]


def _line(columns, at):
    """What eval mode makes of two values far apart, by torch: all between lies on the line through them."""
    torch = pytest.importorskip("torch")
    ends = np.array([-100.0, 100.0])
    vectors = (columns[q][at] for q in ("running_mean", "running_var", "gamma", "beta"))
    mean, var, gamma, beta = (torch.tensor([float(v)], dtype=torch.float64) for v in vectors)
    return ends, torch.nn.functional.batch_norm(torch.tensor(ends)[:, None], mean, var, gamma, beta, eps=1e-3)[
        :, 0
    ].numpy()


def test_to_undo_it_takes_another_pair_for_every_batch(told, raw):
    columns, at = raw
    here = about(told[0], "undo")
    expected = []
    for t in (at, at + 1):
        x = np.array([-1.0, 2.0, 5.0])  # what the pair has to give back, whatever the values
        mean, std = columns["batch_mean"][t], np.sqrt(columns["batch_var"][t] + 1e-3)
        slope, shift = np.polyfit((x - mean) / std, x, 1)
        expected += [slope, shift] if t == at else [at + 1, slope, shift]
    expected += [columns["gamma"][at], columns["beta"][at]]
    assert figures(here.split("step 22", 1)[1]) == [near(x) for x in expected]


def test_what_was_learned_and_how_wide_beta_reaches(path, told, raw):
    columns, _ = raw
    gamma, beta = columns["gamma"], columns["beta"]
    here = about(told[0], "How are γ and β learned")
    assert figures(here)[1:] == [near(x) for x in (gamma[0], gamma[-1], beta[0], beta[-1], STEPS)]
    last = open_run(path).vectors("a", "beta")[1][-1]
    assert figures(about(told[0], "bias"))[:2] == [near(last.min()), near(last.max())]


def test_the_share_above_zero_is_that_of_a_normal_distribution(told, raw):
    columns, at = raw
    gamma, beta = columns["gamma"][at], columns["beta"][at]
    drawn = np.random.default_rng(0).normal(beta, abs(gamma), 200_000)
    ratio, share, _ = figures(about(told[0], "ReLU").split("step 22", 1)[1])
    assert ratio == near(beta / abs(gamma))
    assert share == pytest.approx(100 * (drawn > 0).mean(), abs=0.8)


def test_how_many_values_and_numbers(told):
    assert figures(about(told[0], "axes").split("step 22", 1)[1]) == [60, 4]
    assert figures(about(told[0], "one sample")) == [60, 1, 60, near(60**-0.5)]
    # 4 channels with γ and β, 3 without; both layers are tracked.
    assert figures(about(told[0], "four numbers")) == [4, 8, 8, 2, 8, 14]
    assert about(told[0], "freeze").startswith("2 of 2 layers")


def test_momentum_by_running_the_average(told):
    """After how many batches is nine tenths of an old value gone? Counted, not computed."""
    remembered, batches = 1.0, 0
    while remembered > 0.1:
        remembered, batches = 0.8 * remembered + 0.2 * 0.0, batches + 1
    ratio = np.var(np.arange(60.0), ddof=1) / np.var(np.arange(60.0))
    here = about(told[0], "momentum")
    assert figures(here) == [0.2, near(0.8), 1, 0.2, near(5), batches, 90, 60, 59, pytest.approx(ratio, rel=1e-4)]


def test_noise_is_that_of_batches_at_the_same_weights(path, told):
    run, look = open_run(path), told[1]
    (probe,) = np.flatnonzero(run.probes("a", "batch_mean")[0] == 22)
    means, variances = (run.probes("a", q)[1][probe, :, look.channel].astype(float) for q in bn.runs.schema.PROBED)
    spread = math.sqrt(sum((m - sum(means) / BATCHES) ** 2 for m in means) / BATCHES) / math.sqrt(
        sum(variances) / BATCHES
    )
    stds = [math.sqrt(v) for v in variances]
    center = sum(stds) / BATCHES
    percent = 100 * math.sqrt(sum((s - center) ** 2 for s in stds) / BATCHES) / center
    here = figures(about(told[0], "regularize").split("step 22", 1)[1])
    assert here == [BATCHES, near(spread), pytest.approx(percent, abs=0.5)]


def test_the_gradients_formula_and_factor_are_those_of_torch(told, raw):
    torch = pytest.importorskip("torch")
    columns, at = raw
    mean, var, gamma, beta = (columns[q][at] for q in ("batch_mean", "batch_var", "gamma", "beta"))
    draw = np.random.default_rng(1).normal(size=60)
    x = mean + (draw - draw.mean()) / draw.std() * math.sqrt(var)  # a batch that measures what was recorded
    bn1d = torch.nn.BatchNorm1d(1, eps=1e-3).double()
    torch.nn.init.constant_(bn1d.weight, gamma)
    torch.nn.init.constant_(bn1d.bias, beta)
    given = torch.tensor(x)[:, None].requires_grad_()
    dy = np.random.default_rng(2).normal(size=60)
    bn1d(given).backward(torch.tensor(dy)[:, None])
    factor, in_eval = figures(about(told[0], "gradient flow").split("step 22", 1)[1])
    xhat = (x - x.mean()) / np.sqrt(x.var() + 1e-3)
    formula = gamma / math.sqrt(var + 1e-3) * (dy - dy.mean() - xhat * (dy * xhat).mean())
    np.testing.assert_allclose(given.grad.numpy()[:, 0], formula, rtol=1e-6, atol=1e-9)
    assert factor == near(gamma / math.sqrt(var + 1e-3))
    bn1d.running_var.fill_(columns["running_var"][at])
    bn1d.eval()(given).sum().backward(inputs=[given])
    grown = given.grad.numpy()[:, 0] - formula
    assert in_eval == near(grown.mean())


def test_where_a_number_is_missing_the_answer_is_general(tmp_path):
    info = layer("bn", 2, affine=False, tracks=False)
    values = story(info, 4)
    values["batch_var"][:] = np.nan
    found, _ = said(write_run(tmp_path / "run", [info], [values]))
    assert "track_running_stats=False" in about(found, "Which mean")
    for words in ("undo", "How are", "bias", "ReLU", "regularize", "momentum", "gradient flow"):
        assert about(found, words) == ""
    run = write_run(tmp_path / "empty")
    text = Page(bn.report(run).read_text(encoding="utf-8")).text
    assert text.count("?") >= 12
    assert "nan" not in text


@pytest.mark.parametrize("momentum", [None, 0.0, 1.0, -0.5, 2.0])
def test_any_momentum_has_an_answer(tmp_path, momentum):
    info = layer("bn", 2, momentum=momentum)
    found, _ = said(write_run(tmp_path / "run", [info], [story(info, 3)]))
    assert f"momentum={momentum if momentum is None else format(momentum, 'g')}" in about(found, "momentum")


def test_a_momentum_next_to_nothing_has_a_short_answer(tmp_path):
    info = layer("bn", 2, momentum=1e-300)
    found, _ = said(write_run(tmp_path / "run", [info], [story(info, 3)]))
    assert "the last 2.3e+300 have 90 %" in about(found, "momentum")


def test_numbers_have_three_digits_and_a_minus():
    assert [number(x) for x in (-0.012345, 0, 12.3456, 1e-7)] == ["−0.0123", "0", "12.3", "1e−07"]
