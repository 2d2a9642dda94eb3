"""A recorded training on disk: its format, its journal, and who reads it. NumPy, never torch.

schema     what the files hold        journal    frames that survive a kill       lines     JSON, a line each
folder     made, reopened, marked     lock       one writer                       reader    Run, open_run, list_runs
update     worked steps               explain    their arithmetic               histogram of probes
files      written, through no link   export     to Parquet, Arrow, CSV and TensorBoard
"""

from .reader import Run, list_runs, open_run
from .schema import COLUMNS, QUANTITIES, LayerInfo

__all__ = ["COLUMNS", "QUANTITIES", "LayerInfo", "Run", "list_runs", "open_run"]
