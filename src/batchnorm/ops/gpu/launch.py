"""The kernels launched: what each is passed, of views, cuts and tensors."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from . import maps, merge, sums
from .cut import WARPS, Cut, ceil, cut
from .layout import like, view_of

_COMPUTED = {torch.float64: (torch.float64, tl.float64)}
_CONSTANTS = 6  # rows; see values.py
_MERGED_AT_ONCE = 1024  # values of a tile that merges
# What is launched is typed as what Triton's compiler is passed, not as what a launch is.
_sums: Any = sums.sums
_maps: Any = maps.maps
_merge: Any = merge
_OPTIONS = {"num_warps": WARPS, "enable_fp_fusion": False}


class Walk:
    """One call's x, and what of the call lies like it: all the launches of that call walk them alike."""

    def __init__(
        self, x: Tensor, act: int, slope: float, residual: Any = None, mask: Any = None, dy: Any = None, y: Any = None
    ) -> None:
        self.view, self.x = view_of(x)
        self.residual, self.dy, self.y = like(residual, x), like(dy, x), like(y, x)
        self.mask = None if mask is None else mask.contiguous().view(torch.uint8)
        self.count_of = None if mask is None else mask.sum(dtype=torch.float64)
        self.act, self.slope = act, slope
        self.dtype, self.compute = _COMPUTED.get(x.dtype, (torch.float32, tl.float32))
        self.constants = x.new_empty((_CONSTANTS, self.view.channels), dtype=self.dtype)

    def measure(self, statistics: Tensor, eps: float, weight: Any, bias: Any, *moved: Any) -> None:
        """Write the statistics and constants; move what is `moved`."""
        if self.mask is None:
            partials, shifts = self._sums(None)
            self._moments(partials, shifts, statistics, eps, weight, bias, *moved)
            return
        # Where samples may be missing the first reading finds the shift.
        partials, shifts = self._sums(torch.zeros_like(statistics[1]))
        self._moments(partials, shifts, statistics, eps, None, None)
        partials, shifts = self._sums(statistics[1].to(self.dtype).double())  # as the kernel rounds it
        self._moments(partials, shifts, statistics, eps, weight, bias, *moved)

    def use(self, statistics: Any, eps: float, weight: Any, bias: Any, sums: Any = None, running: Any = None) -> None:
        """Write the constants of statistics that are there, or of running ones, and then those statistics if asked."""
        mean, var = running or (None, None)
        channels = self.view.channels
        _merge.constants[(ceil(channels, 128),)](
            statistics, mean, var, sums, weight, bias, self.constants, eps, channels, BLOCK_CHANNELS=128, **_OPTIONS
        )

    def normalize(self, y: Tensor) -> None:
        """Write y, by the constants."""
        self._maps(y, None, None, measured=False, gradients=False)

    def reduce(self, statistics: Tensor, eps: float, sums: Any, dweight: Any, dbias: Any) -> None:
        """Write the sums, or the parameters' gradients, and the constants that dx needs."""
        partials, _ = self._sums(None, gradients=True)
        channels, inner, parts, tiles = self._merged()
        _merge.gradients[(ceil(channels, tiles[1]),)](
            partials, statistics, sums, dweight, dbias, self.constants, eps, channels, inner, parts,
            BLOCK_PARTS=tiles[0], BLOCK_CHANNELS=tiles[1], **_OPTIONS,
        )  # fmt: skip

    def apply(self, dx: Any, dresidual: Any, measured: bool) -> None:
        """Write dx and dresidual, those that are given, by the constants."""
        self._maps(self.y, dx, dresidual, measured=measured, gradients=True)

    def _sums(self, shifts: Tensor | None, gradients: bool = False) -> tuple[Tensor, Tensor]:
        """The partial sums, and the shifts."""
        view, cut_, given = self.view, self._cut(sums=True), shifts is not None
        partials = self.x.new_empty((2, cut_.partials * view.channels), dtype=self.dtype)
        if shifts is None:
            shifts = self.x.new_empty((view.channels,), dtype=torch.float64)
        _sums[(cut_.programs,)](
            self.x, self.dy, self.residual, self.y, self.mask, self.constants, shifts, partials, self.slope,
            cut_.view.rows, cut_.view.columns // cut_.align, view.inner, view.channels, view.positions, cut_.tiles,
            cut_.parts_of_columns, cut_.rows_per_part, cut_.columns_per_part,
            *_strides(cut_), view.x_row, view.x_channel,
            GRADIENTS=gradients, GIVEN=given, **self._constexprs(cut_, gradients),
        )  # fmt: skip
        return partials, shifts

    def _moments(
        self, partials: Tensor, shifts: Tensor, statistics: Tensor, eps: float, weight: Any, bias: Any,
        running_mean: Any = None, running_var: Any = None, batches: Any = None, momentum: float = 0.0,
        unbiased: bool = True, skip_nonfinite: bool = False,
    ) -> None:  # fmt: skip
        channels, inner, parts, tiles = self._merged()
        _merge.moments[(ceil(channels, tiles[1]),)](
            partials, shifts, self.count_of, statistics, weight, bias, self.constants, running_mean, running_var,
            batches, float(self.view.positions), eps, momentum, channels, inner, parts,
            UNBIASED=unbiased, SKIP=skip_nonfinite, BLOCK_PARTS=tiles[0], BLOCK_CHANNELS=tiles[1], **_OPTIONS,
        )  # fmt: skip

    def _maps(self, y: Any, dx: Any, dresidual: Any, measured: bool, gradients: bool) -> None:
        cut_ = self._cut(sums=False)
        _maps[(cut_.programs,)](
            self.x, self.dy, self.residual, y, self.mask, self.constants, dx, dresidual, self.slope,
            cut_.view.rows, cut_.view.columns // cut_.align, self.view.inner, self.view.channels, cut_.tiles,
            cut_.parts_of_columns, cut_.rows_per_part, cut_.columns_per_part, *_strides(cut_),
            GRADIENTS=gradients, MEASURED=measured, **self._constexprs(cut_, True),
        )  # fmt: skip

    def _cut(self, sums: bool) -> Cut:
        return cut(self.view, sums, self.mask is not None)

    def _constexprs(self, cut_: Cut, activates: bool) -> dict[str, Any]:
        return {
            "ALIGN": cut_.align,
            "PLANES": cut_.view.planes,
            "ACT": self.act if activates else 0,
            "COMPUTE": self.compute,
            "BLOCK_ROWS": cut_.block_rows,
            "BLOCK_COLUMNS": cut_.block_columns,
            **_OPTIONS,
        }

    def _merged(self) -> tuple[int, int, int, tuple[int, int]]:
        """Channels, columns of one channel after the other, partial sums per channel, and the tile that merges them."""
        view = self.view
        inner = 1 if view.planes else view.inner
        across = 8 if inner == 1 else 1  # float32 in one sector of memory
        return view.channels, inner, self._cut(sums=True).partials, (_MERGED_AT_ONCE // across, across)


def track(statistics: Tensor, mean: Tensor, var: Tensor, momentum: float, unbiased: bool, skip_nonfinite: bool) -> None:
    """Move the running statistics toward those."""
    channels = mean.numel()
    _merge.tracked[(ceil(channels, 128),)](
        statistics, mean, var, momentum, channels,
        UNBIASED=unbiased, SKIP=skip_nonfinite, BLOCK_CHANNELS=128, **_OPTIONS,
    )  # fmt: skip


def on(x: Tensor) -> AbstractContextManager[Any]:
    """Launches go to x's device."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _strides(cut_: Cut) -> tuple[int, int, int, int]:
    view, align = cut_.view, cut_.align
    if view.planes:
        return view.x_row // align, view.x_channel // align, view.row // align, view.channel // align
    return view.x_row // align, 0, view.row // align, 0
