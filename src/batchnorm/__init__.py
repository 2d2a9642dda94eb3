"""Batch normalization for PyTorch: layers, a recorder of what they measure, track and learn, and tools.

The names below are the public face. They are looked up on first use (PEP 562), so `import batchnorm`, and every command
that only reads a run, does not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._lazy import face
from ._version import __version__

if TYPE_CHECKING:
    from . import nn as nn
    from .diagnosis import Finding as Finding
    from .diagnosis import compare_modes as compare_modes
    from .diagnosis import diagnose as diagnose
    from .distributed import pool_buffers as pool_buffers
    from .functional import batch_norm as batch_norm
    from .model.backends import backends as backends
    from .model.convert import convert as convert
    from .model.convert import revert as revert
    from .model.summary import summary as summary
    from .moments import Moments as Moments
    from .nn import BatchNorm1d as BatchNorm1d
    from .nn import BatchNorm2d as BatchNorm2d
    from .nn import BatchNorm3d as BatchNorm3d
    from .nn import Renorm as Renorm
    from .nn import SyncBatchNorm as SyncBatchNorm
    from .reporting import report as report
    from .runs import open_run as open_run
    from .tools.accumulate import accumulate as accumulate
    from .tools.adapt import adapt as adapt
    from .tools.fold import fold as fold
    from .tools.freeze import freeze as freeze
    from .tools.freeze import unfreeze as unfreeze
    from .tools.merge import average as average
    from .tools.merge import merge_statistics as merge_statistics
    from .tools.param_groups import param_groups as param_groups
    from .tools.porting import port as port
    from .tools.recalibrate import recalibrate as recalibrate
    from .tools.replace import convert_to as convert_to
    from .tools.update import no_update as no_update
    from .watch import watch as watch

_HOME = {
    "Finding": ".diagnosis",
    "compare_modes": ".diagnosis",
    "diagnose": ".diagnosis",
    "pool_buffers": ".distributed",
    "batch_norm": ".functional",
    "backends": ".model.backends",
    "convert": ".model.convert",
    "revert": ".model.convert",
    "summary": ".model.summary",
    "Moments": ".moments",
    "BatchNorm1d": ".nn",
    "BatchNorm2d": ".nn",
    "BatchNorm3d": ".nn",
    "Renorm": ".nn",
    "SyncBatchNorm": ".nn",
    "report": ".reporting",
    "open_run": ".runs",
    "accumulate": ".tools.accumulate",
    "adapt": ".tools.adapt",
    "fold": ".tools.fold",
    "freeze": ".tools.freeze",
    "unfreeze": ".tools.freeze",
    "average": ".tools.merge",
    "merge_statistics": ".tools.merge",
    "param_groups": ".tools.param_groups",
    "port": ".tools.porting",
    "recalibrate": ".tools.recalibrate",
    "convert_to": ".tools.replace",
    "no_update": ".tools.update",
    "watch": ".watch",
}

__all__ = ["__version__", *face(__name__, _HOME, rooms=["nn"])]  # pyright: ignore[reportUnsupportedDunderAll]
