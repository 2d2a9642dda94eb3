"""Inputs the layers are tried on: every shape, memory format, dtype and option, made once here."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

SHAPES = {
    "NC": (16, 5),
    "NCL": (6, 5, 9),
    "NCHW": (4, 5, 6, 7),
    "NCDHW": (3, 5, 2, 3, 4),
    "one_sample": (1, 5, 4, 4),
    "one_channel": (8, 1, 3),
    "no_samples": (0, 5, 4),
    "no_channels": (4, 0, 3),
    "no_space": (4, 5, 0),
}
LAYOUTS = ("contiguous", "channels_last", "transposed", "sliced", "expanded")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values as x in another memory layout; unchanged where the layout does not exist for its rank."""
    if layout == "channels_last":
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        return x.contiguous(memory_format=formats[x.dim()]) if x.dim() in formats else x
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "sliced":
        padded = x.new_full((*x.shape[:-1], 2 * x.size(-1)), torch.nan)
        padded[..., ::2] = x
        return padded[..., ::2]
    if layout == "expanded":  # the first sample over and over, with stride 0
        return x[:1].expand(x.shape)
    return x


def make(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, mean: float = 1.0, std: float = 2.0) -> Tensor:
    """Normal values."""
    return (torch.randn(shape, dtype=torch.float64) * std + mean).to(dtype)


def vectors(channels: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """weight, bias and running statistics away from their defaults."""
    return {
        "weight": make((channels,), dtype, mean=1.0, std=0.5),
        "bias": make((channels,), dtype, mean=0.0, std=0.5),
        "running_mean": make((channels,), dtype),
        "running_var": make((channels,), dtype).abs() + 0.5,
    }


def torchs(cls: type[nn.Module], *args: Any, bias: bool = True, **options: Any) -> nn.Module:
    """A batch-norm layer of torch.nn's, without beta if so asked: older ones do not take the argument."""
    layer = cls(*args, **options)
    if not bias:
        layer.bias = None
    return layer
