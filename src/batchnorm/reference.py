"""Batch normalization by its definition, forward and backward, in float64: the oracle for all tests.

Nothing here is optimized. Each line is a formula of docs/mathematics.md, which derives it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .activations import NONE, Activation
from .moments import Moments, broadcast_mask, per_channel


class Forward(NamedTuple):
    """y, and the statistics it was normalized with: (C,) mean and biased variance."""

    y: Tensor
    mean: Tensor
    var: Tensor


class Gradients(NamedTuple):
    """Gradients of the loss with respect to each input, given dy; all float64."""

    dx: Tensor
    dweight: Tensor
    dbias: Tensor
    dresidual: Tensor


def forward(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    running: tuple[Tensor, Tensor] | None = None,
    residual: Tensor | None = None,
    activation: Activation = NONE,
    mask: Tensor | None = None,
) -> Forward:
    """Normalize each channel of x, in float64.

        xhat = (x - mean) / sqrt(var + eps);  z = weight * xhat + bias + residual;  y = act(z), 0 where masked

    Args:
        x: (N, C, *), any floating-point dtype.
        weight, bias: (C,), gamma and beta; None stands for 1 and 0.
        eps: added to the variance, so in units of x squared.
        running: (C,) mean and variance to normalize with, as in eval; None measures them on x (biased variance).
        residual: of x's shape, added before the activation.
        mask: bool, broadcastable to x without its channels; True counts.

    Returns:
        Forward(y, mean, var), float64.

    Source: Ioffe & Szegedy 2015, Algorithm 1.

    Example:
        >>> y, mean, var = forward(torch.tensor([[1.0], [3.0]]), eps=0.0)
        >>> y.tolist(), mean.tolist(), var.tolist()
        ([[-1.0], [1.0]], [2.0], [1.0])
    """
    z, mean, var = _pre_activation(x, weight, bias, eps, running, residual, mask)
    y = activation(z)
    if mask is not None:
        y = torch.where(broadcast_mask(mask, x), y, 0.0)
    return Forward(y, mean, var)


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    running: tuple[Tensor, Tensor] | None = None,
    residual: Tensor | None = None,
    activation: Activation = NONE,
    mask: Tensor | None = None,
) -> Gradients:
    """Gradients of `forward`, by the formulas, in float64; the arguments are those of `forward`.

        dz = dy * act'(z), 0 where masked
        dbias = sum(dz);  dweight = sum(dz * xhat);  dresidual = dz
        dx = weight / sqrt(var + eps) * (dz - dbias / n - xhat * dweight / n)      statistics measured on x
        dx = weight / sqrt(var + eps) * dz                                         statistics given

    Args:
        dy: gradient of the loss with respect to y, of x's shape.

    Returns:
        Gradients(dx, dweight, dbias, dresidual), float64; dweight and dbias even where weight or bias is None.
    """
    z, mean, var = _pre_activation(x, weight, bias, eps, running, residual, mask)
    over = [d for d in range(x.dim()) if d != 1]
    shape = per_channel(x)
    counted = torch.ones((), dtype=torch.bool) if mask is None else broadcast_mask(mask, x)

    xhat = torch.where(counted, (x.double() - mean.view(shape)) / torch.sqrt(var + eps).view(shape), 0.0)
    dz = torch.where(counted, dy.double() * activation.derivative(z), 0.0)
    dbias = dz.sum(over)
    dweight = (dz * xhat).sum(over)

    dx = dz
    if running is None:
        n = x.numel() // max(x.size(1), 1) if mask is None else max(int(counted.sum()), 1)
        dx = dz - dbias.view(shape) / n - xhat * dweight.view(shape) / n
    scale = torch.rsqrt(var + eps) if weight is None else weight.double() * torch.rsqrt(var + eps)
    dx = torch.where(counted, dx * scale.view(shape), 0.0)
    return Gradients(dx, dweight, dbias, dz)


def _pre_activation(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    running: tuple[Tensor, Tensor] | None,
    residual: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    if running is None:
        moments = Moments.measure(x, mask)
        mean, var = moments.mean, moments.variance()
    else:
        mean, var = running[0].double(), running[1].double()
    shape = per_channel(x)
    z = (x.double() - mean.view(shape)) / torch.sqrt(var + eps).view(shape)
    if weight is not None:
        z = z * weight.double().view(shape)
    if bias is not None:
        z = z + bias.double().view(shape)
    if residual is not None:
        z = z + residual.double()
    return z, mean, var
