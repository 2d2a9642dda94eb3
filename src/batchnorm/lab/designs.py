"""The experiments, a record each: what learns, in which network, and the defaults of whatever is not given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..view.facts import GAMMA_BETA
from .arms import ARMS
from .models import MODELS


@dataclass(frozen=True)
class Design:
    """What an experiment is.

    Attributes:
        plan: what is trained, in a few words; {model} stands for the network's name.
        rates: the first learning rate with each optimizer; the first of them is the default.
        arms: the default ones, names out of `ARMS`.
        learns: "all", or "gamma and beta": every weight stays at its random initial value.
        models: names out of `MODELS` that it can be run with.
        network: what `build` is given beside the name.
        epochs, steps: how long it takes by default; one of them is None.
        momentum: SGD's.
        falls: whether the learning rate falls linearly to 0. Constant, the last test is a matter of luck, 2 points up
            or down.
        follows_input: record what reaches one unit of the last hidden layer, whenever the network is tested.
    """

    plan: str
    rates: Mapping[str, float]
    arms: tuple[str, ...] = tuple(ARMS)
    learns: str = "all"
    models: tuple[str, ...] = MODELS
    network: Mapping[str, Any] = field(default_factory=dict)
    epochs: int | None = 60
    steps: int | None = None
    momentum: float = 0.9
    falls: bool = True
    follows_input: bool = False


# Rates were chosen on digits, see docs/lab.md.
DESIGNS = {
    "all": Design("{model}", {"sgd": 0.1, "adam": 0.003}),
    "gamma-beta": Design(
        "only gamma and beta of {model}",
        {"adam": 0.02, "sgd": 0.5},
        arms=("learned", "fixed", "per-batch"),  # without batch norm nothing would learn
        learns=GAMMA_BETA,
        network={"wide": True},
    ),
    # Ioffe & Szegedy 2015, section 4.1. It says 50,000 steps and "small random Gaussian values", and no learning rate.
    "paper": Design(
        "section 4.1 of Ioffe & Szegedy 2015, {model}",
        {"sgd": 0.1, "adam": 0.003},
        arms=("learned", "none"),
        models=("mlp",),
        network={"std": 0.1},
        epochs=None,
        steps=3000,
        momentum=0.0,
        falls=False,
        follows_input=True,
    ),
}
# Run where none is asked for by name: the first in the run's folder, the others in folders of their names within it.
USUAL = ("all", "gamma-beta")
