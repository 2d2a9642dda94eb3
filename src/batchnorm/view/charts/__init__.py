"""The charts, in Altair: each made once, for the page, a PNG and a notebook."""

from .arms import arms_curves, arms_final
from .heat import heat
from .layers import bands, gradients, owned, running_mean, running_variance
from .offline import OfflineChart
from .panels import both, learned, measured, parameters
from .paper import paper_accuracy, paper_input
from .theme import DARK, FONT, LIGHT, PADDING, Palette, config

__all__ = [
    "DARK",
    "FONT",
    "LIGHT",
    "PADDING",
    "OfflineChart",
    "Palette",
    "arms_curves",
    "arms_final",
    "bands",
    "both",
    "config",
    "gradients",
    "heat",
    "learned",
    "measured",
    "owned",
    "paper_accuracy",
    "paper_input",
    "parameters",
    "running_mean",
    "running_variance",
]
