"""Fault 5: too few values a channel, so that the statistics of a batch are mostly noise; or a last batch of one."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..finding import Finding
from ..history import History
from ..layer import Layer
from ..measured import Measured
from .mixed import SPLIT, two_clusters
from .rule import Rule

# Standard deviation of the batch mean in standard deviations of the data: 1 / sqrt(n) of n independent values.
NOISE_WARNING, NOISE_SERIOUS = 0.3, 0.5  # 11 and 4 independent values
FEW = 16  # values a channel, where noise cannot be measured
ODD = 16  # a last batch of so many times fewer values
DROP_LAST = "loader = torch.utils.data.DataLoader(dataset, batch_size, shuffle=True, drop_last=True)"
REMEDY = (
    "loader = torch.utils.data.DataLoader(dataset, batch_size=32, shuffle=True)  # larger batches; in several "
    "processes bn.convert(model, sync=True); to fine-tune bn.freeze(model)"
)


class FewValues(Rule):
    name = "few-values"

    def of_run(self, history: History) -> Iterator[Finding]:
        name, counts = history.info.name, history.counts[history.counts > 0]
        if not len(counts):
            return
        usual = float(np.median(counts))
        if history.recent is not None:
            means, variances, _ = history.recent
            # Neighbours in time, so that the drift of the weights is not taken for noise.
            square, variance = (np.diff(means, axis=0) ** 2).mean(0) / 2, variances.mean(0) + history.info.eps
            if two_clusters((means - means.mean(0)) / np.sqrt(variance))[1] < SPLIT:  # two populations are no noise
                yield from self._noisy(name, square, variance, usual)
        elif usual < FEW:
            yield self.found(
                name, "warning", "a batch has {values:g} values a channel", REMEDY, confidence=0.6, values=usual
            )
        yield from self._odd(name, usual, float(counts.min()))

    def of_measured(self, layer: Layer, measured: Measured) -> Iterator[Finding]:
        eps = layer.eps
        if measured.lonely:
            yield self.found(
                layer.name,
                "serious",
                "{lonely} of {batches} batches have one value a channel, which has no variance: training on "
                "them raises",
                DROP_LAST,
                lonely=measured.lonely,
                batches=measured.lonely + measured.batches,
            )
        if measured.remainder == 1:
            yield self.found(
                layer.name,
                "warning",
                "the number of samples leaves a last batch of {items} sample",
                DROP_LAST,
                items=1,
            )
        if not measured.batches:
            return
        usual = float(np.median(measured.counts))
        if measured.within is not None:
            # Of independent items: it does not count what differs between batches for another reason.
            square = measured.within / np.median(measured.samples)
            yield from self._noisy(layer.name, square, measured.var + eps, usual)
        yield from self._odd(layer.name, usual, float(measured.counts.min()))

    def _noisy(self, name: str, square: np.ndarray, variance: np.ndarray, usual: float) -> Iterator[Finding]:
        noise = float(np.sqrt(np.mean(square / variance)))
        if noise > NOISE_WARNING:
            yield self.found(
                name,
                "serious" if noise > NOISE_SERIOUS else "warning",
                "the batch mean has a noise of {noise:.2f} standard deviations, as that of {worth:.1f} independent "
                "values; a batch has {values:g} values a channel",
                REMEDY,
                confidence=0.9,
                noise=noise,
                worth=noise**-2,
                values=usual,
            )

    def _odd(self, name: str, usual: float, least: float) -> Iterator[Finding]:
        if least * ODD <= usual:
            yield self.found(
                name,
                "warning",
                "the smallest batch has {least:g} values a channel where most have {usual:g}, and moves the running "
                "statistics as much as they do",
                DROP_LAST,
                least=least,
                usual=usual,
            )
