"""A recorded training on disk: its format, its journal, and who reads it. Uses NumPy, never torch.

schema     what the files hold        journal    frames that survive a kill       lines     JSON, a line each
folder     made, reopened, marked     lock       one writer                       reader    Run, open_run, list_runs
files      written, through no link   export     to other formats                 sources   a file read whole
tail       a run that grows, followed update     worked steps                     explain   their arithmetic
histogram  of a probe
"""

from .reader import Run, list_runs, open_run
from .schema import COLUMNS, QUANTITIES, LayerInfo

__all__ = ["COLUMNS", "QUANTITIES", "LayerInfo", "Run", "list_runs", "open_run"]
