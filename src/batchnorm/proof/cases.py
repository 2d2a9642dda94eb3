"""What the kernels are tried on: every way to walk a tensor, dtype, activation and operand, small."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from .. import activations
from ..activations import Activation

Layout = Literal["contiguous", "last", "gaps", "transposed"]
Way = Literal["whole", "steps", "eval"]

# One for each way to walk: rows, joined rows, channels last, short planes, planes; and planes and rows with gaps.
WALKS: tuple[tuple[tuple[int, ...], Layout], ...] = (
    ((300, 24), "contiguous"),
    ((700, 6), "contiguous"),
    ((3, 65, 5, 5), "last"),
    ((9, 6, 7, 7), "contiguous"),
    ((2, 3, 40, 40), "contiguous"),
    ((2, 3, 40, 40), "gaps"),
    ((90, 24), "gaps"),
)
# Tails and cuts: rows that cannot be joined, one channel, several parts of rows and of planes, 1-D and 3-D positions.
OTHERS: tuple[tuple[tuple[int, ...], Layout], ...] = (
    ((1007, 5), "contiguous"),
    ((2, 3), "contiguous"),
    ((5, 300), "contiguous"),
    ((64, 1), "contiguous"),
    ((2, 8, 40, 40), "last"),
    ((2, 300, 5, 5), "last"),
    ((4, 37, 30), "contiguous"),
    ((200, 3, 7, 7), "contiguous"),
    ((1, 2, 75, 75), "contiguous"),
    ((70, 2, 33, 33), "contiguous"),
    ((3, 5, 2, 3, 4), "contiguous"),
    ((2, 4, 9, 9, 9), "last"),
    ((5, 6, 20), "transposed"),
    ((1, 5, 4, 4), "contiguous"),
)
SLOPES = {"leaky_relu": 0.2, "elu": 1.3}
ACTIVATIONS = tuple(
    Activation(name, SLOPES.get(name, 0.0))
    for name in ("none", *activations.NAMES[:6], "gelu_tanh", *activations.NAMES[6:])
)
_NONE, _RELU, _TANH = Activation("none"), Activation("relu"), Activation("tanh")


@dataclass(frozen=True)
class Case:
    """One call, forward and backward.

    Attributes:
        shape, layout, dtype: of x (N, C, *).
        activation: fused.
        residual: added before it; `keeps_y`: backward is given y in its place.
        mask: a third of the samples are missing.
        affine: with weight and bias.
        way: one operator each way; measure, normalize, reduce, apply; or by running statistics.
        mean: of x, whose standard deviation is 2.
        vectors: dtype of weight, bias and running statistics; None: float32, or float64 of such an x.
    """

    shape: tuple[int, ...]
    layout: Layout
    dtype: torch.dtype
    activation: Activation = _NONE
    residual: bool = False
    keeps_y: bool = False
    mask: bool = False
    affine: bool = True
    way: Way = "whole"
    mean: float = 1.0
    vectors: torch.dtype | None = None

    def __str__(self) -> str:
        said = ["x".join(map(str, self.shape)), self.layout, str(self.dtype)[6:], str(self.activation), self.way]
        said += [name for name in ("residual", "keeps_y", "mask") if getattr(self, name)]
        said += [] if self.affine else ["not affine"]
        said += [] if self.vectors is None else [f"vectors of {str(self.vectors)[6:]}"]
        return " ".join([*said, *([] if self.mean == 1.0 else [f"mean {self.mean:g}"])])


def cases() -> Iterator[Case]:
    """All of them."""
    float32, float64, bfloat16, float16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
    for dtype in (float32, float64):  # value by value, so that how they are walked does not matter
        yield from (Case((40, 24), "contiguous", dtype, activation) for activation in ACTIVATIONS)
    for dtype, vectors in ((bfloat16, bfloat16), (float16, float16), (float32, float64), (float64, bfloat16)):
        yield from (Case((40, 24), "contiguous", dtype, vectors=vectors, way=way) for way in ("whole", "eval"))
    for shape, layout in WALKS:
        plain = Case(shape, layout, float32)
        for dtype in (float32, bfloat16) if layout == "gaps" else (float32, float64, bfloat16, float16):
            typed = replace(plain, dtype=dtype)
            yield replace(typed, affine=False)
            yield replace(typed, activation=_RELU, residual=True, keeps_y=True, way="steps")
            yield replace(typed, activation=_TANH, residual=True, way="eval")
        for dtype in (float32, bfloat16):
            yield replace(plain, dtype=dtype, activation=_RELU, mask=True, residual=True)
        yield replace(plain, activation=_TANH, residual=True, keeps_y=True)
        yield replace(plain, way="eval", affine=False)
        yield replace(plain, mask=True, mean=1e6, way="steps")
        yield replace(plain, mean=1e6)
        yield replace(plain, mean=-3e4, activation=_RELU)
    for shape, layout in OTHERS:
        yield Case(shape, layout, float32)
        yield Case(shape, layout, bfloat16, _RELU, residual=True)


def laid_out(x: Tensor, layout: Layout) -> Tensor:
    """The values of x in a layout: channels last; rows, or planes, with gaps; or with strides that no view has."""
    if layout == "last":
        return x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
    if layout == "gaps":  # more channels than are used
        wider = torch.full((x.size(0), x.size(1) + 8, *x.shape[2:]), torch.nan, dtype=x.dtype, device=x.device)
        wider[:, : x.size(1)] = x
        return wider[:, : x.size(1)]
    return x.transpose(0, -1).contiguous().transpose(0, -1) if layout == "transposed" else x
