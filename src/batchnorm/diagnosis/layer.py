"""Layer: what is known of a batch-norm layer as it stands, in NumPy, wherever it was read from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
ITSELF = "(the layer itself)"  # the name of a layer that is the model


@dataclass(frozen=True)
class Settings:
    """How the layer was built. A checkpoint does not say; a model and a run do."""

    kind: str
    eps: float
    momentum: float | None
    tracks: bool


# What torch.nn's layers are built with: assumed of a layer whose settings are not known.
USUAL = Settings("BatchNorm", eps=1e-5, momentum=0.1, tracks=True)


@dataclass(frozen=True)
class Place:
    """Where the layer is in its model, and what is done to it. Only a model says.

    Attributes:
        training, model_training: the mode of the layer, and of the model.
        frozen: whether its statistics were frozen by `freeze`.
        learns: whether gamma or beta requires a gradient.
        decay: the weight decay that the optimizer applies to gamma or beta; 0 without an optimizer.
        undecayed: Python that makes such an optimizer without it.
        before, before_kind: name and class of the module before it.
        has_bias: whether that one adds a bias of as many channels.
        surely: whether the modules before and after are known (a Sequential), or taken from the order of definition.
        rectified: whether a ReLU comes after; None where nobody can tell.
        wrong_axis: the module before it has its features in the last dimension, and of another number.
        width: how many features that one gives out.
    """

    training: bool
    model_training: bool
    frozen: bool = False
    learns: bool = True
    decay: float = 0.0
    undecayed: str = ""
    before: str | None = None
    before_kind: str = ""
    has_bias: bool = False
    surely: bool = False
    rectified: bool | None = None
    wrong_axis: bool = False
    width: int | None = None

    @property
    def before_said(self) -> str:
        """The module before it, as one says it: "conv1 (Conv2d)"."""
        return f"{self.before} ({self.before_kind})"


@dataclass(frozen=True)
class Layer:
    """A batch-norm layer.

    Attributes:
        name: in the model.
        gamma, beta, running_mean, running_var: (C,) float64; None for what it has not, or what was not recorded.
        updates: how many batches the running statistics have tracked; None if unknown.
        settings, place: None where they are not known.
        step: of the run from which it was read.
    """

    name: str
    gamma: Array | None = None
    beta: Array | None = None
    running_mean: Array | None = None
    running_var: Array | None = None
    updates: int | None = None
    settings: Settings | None = None
    place: Place | None = None
    step: int | None = None

    @property
    def eps(self) -> float:
        """As the layer was built, or PyTorch's."""
        return (self.settings or USUAL).eps

    @property
    def momentum(self) -> float | None:
        """As the layer was built, or PyTorch's."""
        return (self.settings or USUAL).momentum

    def assumes(self, *names: str) -> tuple[str, ...]:
        """Of these settings, those that are not known and assumed."""
        return names if self.settings is None else ()

    @property
    def channels(self) -> int:
        """C; 0 for a layer of which no vector is known."""
        known = (self.running_var, self.running_mean, self.gamma, self.beta)
        return next((len(vector) for vector in known if vector is not None), 0)

    @property
    def is_fresh(self) -> bool:
        """Whether the running statistics are exactly those of a new layer, 0 and 1."""
        return (
            self.running_mean is not None
            and self.running_var is not None
            and bool((self.running_mean == 0).all() and (self.running_var == 1).all())
        )

    @property
    def has_learned(self) -> bool:
        """Whether beta shows that the layer was trained: it differs between the channels.

        Initializations set beta to one number. Gamma shows nothing: it may begin as 0 (the last norm of a residual
        block), or drawn at random (generators).
        """
        return self.beta is not None and bool(np.ptp(self.beta) > 0)

    @property
    def is_new(self) -> bool:
        """Whether nothing shows that the layer was ever trained, or has tracked a batch."""
        return self.is_fresh and not self.updates and not self.has_learned

    @property
    def is_plain(self) -> bool:
        """Whether gamma is one number for all channels, and beta too: a design, or a new layer's."""
        return all(vector is None or not np.ptp(vector) for vector in (self.gamma, self.beta))


def drift(mean: Array, var: Array, true_mean: Array, true_var: Array, eps: float) -> tuple[float, float]:
    """How far tracked statistics are from measured ones, over the channels of a layer.

    Both as root mean square over channels, so that a few channels that are far off count, and one of many that is a
    little off does not. eps belongs to both variances, for it is what a layer divides by: without it a channel that is
    constant would be infinitely far off and yet do no harm.

    Returns:
        |mean - true mean| in standard deviations, and |log(var / true var)|.
    """
    spread = np.maximum(true_var, 0) + eps
    shift = (mean - true_mean) ** 2 / spread
    ratio = np.log((np.maximum(var, 0) + eps) / spread) ** 2
    return float(np.sqrt(shift.mean())), float(np.sqrt(ratio.mean()))
