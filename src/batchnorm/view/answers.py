"""What learners ask, answered by this run's own numbers where it holds them.

What it says is computed from the channel at
which the page opens; it says nothing where a number that it needs was not recorded, or was not finite.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .facts import plural
from .questions import ASKED

if TYPE_CHECKING:
    from ..runs.reader import Run
    from .look import Look


@dataclass(frozen=True)
class Answer:
    """A question, the answer in general, and what this run has to say to it."""

    question: str
    general: tuple[str, ...]
    here: str = ""


def answers(run: Run, look: Look | None) -> list[Answer]:
    """Return the twelve answers.

    Args:
        run: a run of one arm.
        look: where the page opens; None for a run without whole vectors, which is answered in general.
    """
    with np.errstate(all="ignore"):  # what is not finite is data here
        return [Answer(*asked, here(run, look) if look else "") for asked, here in zip(ASKED, _HERE, strict=True)]


def number(value: float) -> str:
    """Return a number with three digits, and a minus sign that is one."""
    return f"{value:.3g}".replace("-", "−")


def _eval(run: Run, look: Look) -> str:
    info = look.info
    if not info.tracks:
        return f"{info.name or 'It'} has track_running_stats=False: in eval mode it measures each batch too."
    std, running_std = (math.sqrt(v + info.eps) if v + info.eps > 0 else math.nan for v in (look.var, look.running_var))
    gamma, beta = (look.gamma, look.beta) if info.affine else (1.0, 0.0)
    in_eval = gamma * (look.mean - look.running_mean) / running_std + beta
    if not _finite(look.running_mean, look.mean, std, in_eval):
        return ""
    said = (
        f"At {look.where} this batch’s mean is {number(look.mean)}, and the running mean {number(look.running_mean)}: "
        f"{_away(look.running_mean - look.mean, std)}. So the value {number(look.mean)} goes out as {number(beta)} in "
        f"train mode, and as {number(in_eval)} in eval mode."
    )
    if not len(look.probe_means):
        return f"{said} The reason: batches differ, and the running mean also holds batches of earlier weights."
    usual = float(look.probe_means.mean())
    return (
        f"{said} This batch differs from others: {len(look.probe_means)} others at the same weights have a mean of "
        f"{number(usual)}, {_away(usual - look.mean, std)}. And the running mean is not theirs: it also holds batches "
        f"of earlier weights, and lies {_away(look.running_mean - usual, std)}."
    )


def _away(distance: float, std: float) -> str:
    return f"{number(abs(distance) / std)} standard deviations {'above' if distance > 0 else 'below'}"


def _undo(run: Run, look: Look) -> str:
    needed = [math.sqrt(v + look.info.eps) if v >= 0 else math.nan for v in (look.var, look.next_var)]
    if not _finite(look.gamma, look.beta, look.mean, look.next_mean, *needed):
        return ""
    return (
        f"At {look.where}: to undo it for this batch takes γ = {number(needed[0])} and β = {number(look.mean)}; for "
        f"the batch of step {look.next_step:,} γ = {number(needed[1])} and β = {number(look.next_mean)}. There is one "
        f"pair for all: γ = {number(look.gamma)}, β = {number(look.beta)}."
    )


def _learned(run: Run, look: Look) -> str:
    if not _finite(*look.first, *look.last):
        return ""
    (gamma, beta), (to_gamma, to_beta) = look.first, look.last
    return (
        f"In channel {look.channel} of layer {look.info.name or '(the model itself)'} γ went from {number(gamma)} to "
        f"{number(to_gamma)} and β from {number(beta)} to {number(to_beta)}, over {len(run.steps):,} recorded steps."
    )


def _bias(run: Run, look: Look) -> str:
    beta = run.stats(look.info.name, "beta")[-1]
    if not look.info.affine or not _finite(beta[0], beta[6]):
        return ""
    return (
        f"In layer {look.info.name or '(the model itself)'} that is what β does: at the last step it lies between "
        f"{number(beta[0])} and {number(beta[6])} over the {plural(look.info.channels, 'channel')}."
    )


def _frozen(run: Run, look: Look) -> str:
    ran = [bool(run.forwards(info.name).all()) for info in run.layers]
    what = "measured their batches" if len(ran) > 1 else "measured its batch"
    return f"{sum(ran)} of {plural(len(ran), 'layer')} {what} in every recorded step, so in train mode."


def _axes(run: Run, look: Look) -> str:
    if look.count < 1:
        return ""
    return (
        f"At {look.where} one mean is that of {plural(look.count, 'value')}; the layer has "
        f"{plural(look.info.channels, 'channel')}, so it has as many means."
    )


def _relu(run: Run, look: Look) -> str:
    if not _finite(look.gamma, look.beta) or not look.gamma:
        return ""
    above = 0.5 * math.erfc(-look.beta / abs(look.gamma) / math.sqrt(2))
    return (
        f"At {look.where} β/|γ| = {number(look.beta / abs(look.gamma))}: if its values are about normally distributed, "
        f"{above:.0%} of what goes out are above 0, and would pass a ReLU."
    )


def _one(run: Run, look: Look) -> str:
    counts = run.counts(look.info.name)
    counts = counts[counts > 0]
    if not len(counts):
        return ""
    least = int(counts.min())
    return (
        f"The smallest recorded batch of layer {look.info.name or '(the model itself)'} had {plural(least, 'value')} a "
        f"channel. If they were independent, its mean would be off by about 1/√{least:,} = "
        f"{number(1 / math.sqrt(least))} standard deviations."
    )


def _noise(run: Run, look: Look) -> str:
    means, variances = look.probe_means, look.probe_vars
    if len(means) < 2 or len(variances) < 2 or not variances.min() > 0:
        return ""
    std = np.sqrt(variances)
    return (
        f"At {look.where}, {len(means)} batches at the same weights had means that vary by "
        f"{number(means.std() / math.sqrt(variances.mean()))} standard deviations of the values, and standard "
        f"deviations that vary by {std.std() / std.mean():.0%}. The others in its batch move a sample by this much."
    )


def _four(run: Run, look: Look) -> str:
    learned = sum(2 * info.channels for info in run.layers if info.affine)
    tracked = sum(2 * info.channels for info in run.layers if info.tracks)
    c = look.info.channels
    return (
        f"Layer {look.info.name or '(the model itself)'} has {plural(c, 'channel')}: {2 * c * look.info.affine:,} "
        f"learned and {2 * c * look.info.tracks:,} tracked numbers. All {plural(len(run.layers), 'layer')} together: "
        f"{learned:,} learned and {tracked:,} tracked."
    )


def _momentum(run: Run, look: Look) -> str:
    m = look.info.momentum
    if not look.info.tracks:
        return ""
    if m is None:
        return "This layer has momentum=None: its running statistics are the plain average of all batches so far."
    if not 0 < m < 1:
        return f"This layer has momentum={m:g}."
    most = math.log(0.1) / math.log1p(-m)
    last = f"{math.ceil(most):,}" if most < 1e6 else number(most)
    factor = ""
    if look.count > 1:
        factor = (
            f" The variance that is averaged is the unbiased one, here {look.count:,}/{look.count - 1:,} = "
            f"{look.count / (look.count - 1):.5g} times the one that normalizes."
        )
    return (
        f"This layer has momentum {m:g}, which in Keras is {1 - m:g}: about the last 1/{m:g} = {number(1 / m)} batches "
        f"count, and the last {last} have 90 % of the weight.{factor}"
    )


def _gradient(run: Run, look: Look) -> str:
    eps = look.info.eps
    stds = [math.sqrt(v + eps) if v + eps > 0 else math.nan for v in (look.var, look.running_var)]
    gamma = look.gamma if look.info.affine else 1.0
    if not _finite(gamma, stds[0]):
        return ""
    said = f"At {look.where} the factor in front, γ/√(var + ε), is {number(gamma / stds[0])}"
    return said + (f"; in eval it would be {number(gamma / stds[1])}." if _finite(stds[1]) else ".")


def _finite(*values: float) -> bool:
    return bool(np.isfinite(values).all())


_HERE: tuple[Callable[[Run, Look], str], ...] = (
    _eval,
    _undo,
    _learned,
    _bias,
    _frozen,
    _axes,
    _relu,
    _one,
    _noise,
    _four,
    _momentum,
    _gradient,
)
