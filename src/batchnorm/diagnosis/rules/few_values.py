"""Fault 5: too few values a channel, so that the statistics of a batch are mostly noise; or a last batch of one."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..finding import Finding
from ..history import History
from ..layer import Layer
from ..measured import Measured
from .mixed import SPLIT, not_random, two_clusters, unshuffled
from .rule import Rule

# Standard deviation of the batch mean in standard deviations of the data: 1 / sqrt(n) of n independent values.
NOISE_WARNING, NOISE_SERIOUS = 0.3, 0.5  # 11 and 4 independent values
# Standard deviation of the log of the batch variance: sqrt(2 / n) of n independent normal values.
SHAKE_WARNING, SHAKE_SERIOUS = 0.4, 0.6  # 12 and 6
FEW = 16  # values a channel
LEAST = 8  # batches, for a standard deviation over them
FEW_ITEMS = 2
ALIKE = 8  # times as many values as they are worth
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
            spread = variances.mean(0) + history.info.eps
            # Neighbors in time, so that the drift of the weights is not taken for noise.
            square = (np.diff(means, axis=0) ** 2).mean(0) / 2
            logs = _variance(np.diff(np.log(variances + history.info.eps), axis=0)) / 2
            # Two populations, or an order of the data, are no noise.
            if two_clusters((means - means.mean(0)) / np.sqrt(spread))[1] < SPLIT and not unshuffled(history):
                yield from self._noisy(name, square / spread, logs, usual)
        if usual <= FEW:
            yield self.found(
                name, "warning", "a batch has {values:g} values per channel", REMEDY, confidence=0.6, values=usual
            )
        yield from self._odd(name, usual, float(counts.min()))

    def of_measured(self, layer: Layer, measured: Measured) -> Iterator[Finding]:
        if measured.lonely:
            yield self.found(
                layer.name,
                "serious",
                "{lonely} of {batches} batches have one value per channel, which has no variance: training on "
                "them raises",
                DROP_LAST if measured.batches else REMEDY,
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
        items, many = float(np.median(measured.samples)), measured.batches >= LEAST
        square = np.zeros_like(measured.var)
        if measured.within is not None:
            # Of independent items: it does not count what differs between batches for another reason.
            square = measured.within / items
        elif many:  # batches of one item
            square = measured.means.var(0, ddof=1)
        logs = np.zeros_like(square)
        if many and not not_random(measured):
            logarithms = np.log(measured.variances + layer.eps)
            logs = _variance(logarithms - np.median(logarithms, axis=0))
        yield from self._noisy(layer.name, square / (measured.var + layer.eps), logs, usual)
        if items <= FEW_ITEMS:
            yield self.found(
                layer.name,
                "warning",
                "a batch has only {items:g} samples, and each is normalized by the statistics of all of them",
                REMEDY,
                confidence=0.7,
                items=items,
                values=usual,
            )
        yield from self._odd(layer.name, usual, float(measured.counts.min()))

    def _noisy(self, name: str, means: np.ndarray, logs: np.ndarray, usual: float) -> Iterator[Finding]:
        """Judge by the variance of the batch mean, in variances of the data, and of the log of the batch variance."""
        # The median of the logs, which those of channels that are nearly constant do not move.
        noise, shake = float(np.sqrt(means.mean())), float(np.sqrt(np.median(logs)))
        if noise > NOISE_WARNING or shake > SHAKE_WARNING:
            worth = 1 / max(noise**2, shake**2 / 2)
            alike = ", which are alike (few samples, or data that are not shuffled)" if usual > ALIKE * worth else ""
            yield self.found(
                name,
                "serious" if noise > NOISE_SERIOUS or shake > SHAKE_SERIOUS else "warning",
                "the statistics of a batch are as noisy as those of {worth:.1f} independent values: its mean by "
                "{noise:.2f} standard deviations, its variance by a factor of {factor:.3g}; a batch has {values:g} "
                f"values per channel{alike}",
                REMEDY,
                confidence=0.9,
                noise=noise,
                factor=float(np.exp(shake)),
                worth=worth,
                values=usual,
            )

    def _odd(self, name: str, usual: float, least: float) -> Iterator[Finding]:
        if least * ODD <= usual:
            yield self.found(
                name,
                "warning",
                "the smallest batch has {least:g} values per channel, most have {usual:g}, and it moves the running "
                "statistics as much as the others",
                DROP_LAST,
                least=least,
                usual=usual,
            )


def _variance(deviations: np.ndarray) -> np.ndarray:
    """Of (B, C) normal deviations, by their median, to which a few odd batches do nothing."""
    return np.median(deviations**2, axis=0) / 0.4549  # the median of a squared normal number
