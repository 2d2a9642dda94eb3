"""What an experiment is asked to do: checked once, kept in the run, compared when it is resumed."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from .arms import ARMS
from .errors import LabError
from .models import MODELS
from .sources import canonical

EXPERIMENTS = {
    "all": "all that the network has learns",
    "gamma-beta": "gamma and beta alone learn; every weight stays at its random initial value",
}
# Chosen on digits, see docs/lab.md; momentum is the usual one.
DEFAULT_OPTIMIZER = {"all": "sgd", "gamma-beta": "adam"}
DEFAULT_LR = {"all": {"sgd": 0.1, "adam": 0.003}, "gamma-beta": {"sgd": 0.5, "adam": 0.02}}
SGD_MOMENTUM = 0.9


@dataclass(frozen=True)
class Settings:
    """The settings of an experiment; whatever is not given has its default.

    Attributes:
        experiment: what learns: a name out of `EXPERIMENTS`.
        data: a name or path that `data.load` takes; a path is made absolute.
        model: "mlp" or "cnn".
        arms: names out of `ARMS`, in the order in which they run; with gamma-beta all but "none", which has neither.
        epochs: passes over the training part.
        batch_size: samples a step, at least 2: a batch of one has no variance.
        lr: learning rate of the first step, from which it falls linearly to 0; None for the default: 0.1 for SGD and
            0.003 for Adam, with gamma-beta 0.5 and 0.02.
        optimizer: "sgd" (with momentum 0.9) or "adam"; None for the default, SGD, with gamma-beta Adam.
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
    arms: tuple[str, ...] = tuple(ARMS)
    epochs: int = 60
    batch_size: int = 60
    lr: float | None = None
    optimizer: str | None = None
    seed: int = 0
    processes: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "data", canonical(self.data))
        object.__setattr__(self, "arms", tuple(self.arms))
        self._expect("experiment", self.experiment in EXPERIMENTS, f"one of {', '.join(EXPERIMENTS)}")
        if self.experiment == "gamma-beta" and self.arms == tuple(ARMS):
            object.__setattr__(self, "arms", tuple(arm for arm in ARMS if arm != "none"))
        if self.optimizer is None:
            object.__setattr__(self, "optimizer", DEFAULT_OPTIMIZER[self.experiment])
        self._expect("model", self.model in MODELS, f"one of {', '.join(MODELS)}")
        self._expect("optimizer", self.optimizer in DEFAULT_LR["all"], f"one of {', '.join(DEFAULT_LR['all'])}")
        distinct = len(set(self.arms)) == len(self.arms) > 0
        self._expect("arms", distinct and set(self.arms) <= set(ARMS), f"some of {','.join(ARMS)}, each once")
        learns = self.experiment == "all" or "none" not in self.arms
        self._expect("arms", learns, "no none with gamma-beta: without batch norm nothing would learn")
        shared = self.processes == 1 or "per-batch" not in self.arms
        self._expect("arms", shared, "no per-batch with --sync: a pair belongs to one batch, not to shares of it")
        self._expect("epochs", self.epochs >= 1, "at least 1")
        self._expect("batch_size", self.batch_size >= 2, "at least 2, since one sample has no variance")
        self._expect("seed", 0 <= self.seed < 2**63, "a whole number from 0 to 2^63 - 1")
        if self.lr is None:
            object.__setattr__(self, "lr", DEFAULT_LR[self.experiment][self.optimizer])  # pyright: ignore[reportArgumentType]
        self._expect("lr", self.lr is not None and 0 < self.lr < math.inf, "a number above 0")

    def _expect(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            value = getattr(self, name)
            got = ",".join(value) if name == "arms" else value
            raise LabError(f"--{name.replace('_', '-')}: expected {expected}, got {got!r}")

    def to_meta(self) -> dict[str, Any]:
        """As JSON."""
        return {**asdict(self), "arms": list(self.arms)}

    @classmethod
    def from_meta(cls, meta: dict[str, Any]) -> Settings:
        """The settings of a run that is there already.

        Raises:
            LabError: the run was not made by `batchnorm train`.
        """
        try:
            meta = {"processes": 1, "experiment": "all", **meta}  # older runs do not say
            return cls(**{field.name: meta[field.name] for field in fields(cls)})
        except (KeyError, TypeError) as error:
            raise LabError(f"not a run of `batchnorm train`, which alone can be resumed: no valid {error}") from None
