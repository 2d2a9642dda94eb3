"""The training programs of `batchnorm train`: data, two networks, four arms, and an experiment that can be resumed."""

from .arms import ARMS, PairPerBatch
from .data import Data, load
from .errors import DataError, LabError
from .experiment import Experiment
from .models import MODELS, build
from .settings import Settings
from .training import Tick, Training

__all__ = [
    "ARMS",
    "MODELS",
    "Data",
    "DataError",
    "Experiment",
    "LabError",
    "PairPerBatch",
    "Settings",
    "Tick",
    "Training",
    "build",
    "load",
]
