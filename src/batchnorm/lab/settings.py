"""What an experiment is asked to do: checked once, kept in the run, compared when it is resumed."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, cast

from .arms import ARMS
from .designs import DESIGNS, Design
from .errors import LabError
from .sources import canonical


@dataclass(frozen=True)
class Settings:
    """The settings of an experiment; whatever is not given has its default.

    Attributes:
        experiment: a name out of `DESIGNS`, which has the defaults of what follows.
        data: a name or path that `data.load` takes; a path is made absolute.
        model: "mlp" or "cnn"; with paper "mlp" alone.
        arms: names out of `ARMS`, in the order in which they run; none given for the default ones. With gamma-beta
            "none" is not among them: nothing would learn.
        epochs: passes over the training part; None where the training is counted in steps.
        steps: of the training; None where it is counted in epochs.
        batch_size: samples a step, at least 2: a batch of one has no variance.
        lr: learning rate of the first step; None for the experiment's own with that optimizer.
        optimizer: "sgd" or "adam"; None for the experiment's own.
        seed: of the initial weights and of the batches, the same in every arm.
        processes: that train together, each on its share of every batch.
    Raises:
        LabError: a setting that cannot be.

    Example:
        >>> Settings(epochs=3).lr
        0.1
        >>> Settings(model="rnn")
        Traceback (most recent call last):
        batchnorm.lab.errors.LabError: --model: expected one of mlp, cnn, got 'rnn'
    """

    experiment: str = "all"
    data: str = "digits"
    model: str = "mlp"
    arms: tuple[str, ...] = ()
    epochs: int | None = None
    steps: int | None = None
    batch_size: int = 60
    lr: float | None = None
    optimizer: str | None = None
    seed: int = 0
    processes: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "data", canonical(self.data))
        self._expect("experiment", self.experiment in DESIGNS, f"one of {', '.join(DESIGNS)}")
        design = self.design
        object.__setattr__(self, "arms", tuple(self.arms) or design.arms)
        if self.optimizer is None:
            object.__setattr__(self, "optimizer", next(iter(design.rates)))
        self._expect("model", self.model in design.models, f"one of {', '.join(design.models)}")
        self._expect("optimizer", self.optimizer in design.rates, f"one of {', '.join(design.rates)}")
        distinct = len(set(self.arms)) == len(self.arms) > 0
        self._expect("arms", distinct and set(self.arms) <= set(ARMS), f"some of {','.join(ARMS)}, each once")
        learns = design.learns == "all" or "none" not in self.arms
        self._expect("arms", learns, f"no arm none with {self.experiment}: without batch norm nothing would learn")
        shared = self.processes == 1 or "per-batch" not in self.arms
        self._expect("arms", shared, "no per-batch with --sync: a pair belongs to one batch, not to shares of it")
        self._expect("steps", self.epochs is None or self.steps is None, "no number of steps beside one of epochs")
        if self.epochs is self.steps is None:
            object.__setattr__(self, "epochs", design.epochs)
            object.__setattr__(self, "steps", design.steps)
        self._expect("epochs", self.epochs is None or self.epochs >= 1, "at least 1")
        self._expect("steps", self.steps is None or self.steps >= 1, "at least 1")
        self._expect("batch_size", self.batch_size >= 2, "at least 2, since one sample has no variance")
        self._expect("seed", 0 <= self.seed < 2**63, "a whole number from 0 to 2^63 - 1")
        if self.lr is None:
            object.__setattr__(self, "lr", design.rates[cast(str, self.optimizer)])
        self._expect("lr", self.lr is not None and 0 < self.lr < math.inf, "a number above 0")

    @property
    def design(self) -> Design:
        """What that experiment is."""
        return DESIGNS[self.experiment]

    def _expect(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            value = getattr(self, name)
            got = ",".join(value) if name == "arms" else value
            raise LabError(f"--{name.replace('_', '-')}: expected {expected}, got {got!r}")

    def to_meta(self) -> dict[str, Any]:
        """As JSON; what is None is not there."""
        there = {name: value for name, value in asdict(self).items() if value is not None}
        return {**there, "arms": list(self.arms)}

    @classmethod
    def from_meta(cls, meta: dict[str, Any]) -> Settings:
        """The settings of a run that is there already.

        Raises:
            LabError: the run was not made by `batchnorm train`.
        """
        try:
            meta = {"processes": 1, "experiment": "all", "epochs": None, "steps": None, **meta}  # older runs do not say
            return cls(**{field.name: meta[field.name] for field in fields(cls)})
        except (KeyError, TypeError) as error:
            raise LabError(f"not a run of `batchnorm train`, which alone can be resumed: no valid {error}") from None
