"""The two networks of the lab, for samples of any shape and any number of classes, with batch norm or without."""

from __future__ import annotations

import math
from collections import OrderedDict

import torch
from torch import Generator, nn

from ..nn import BatchNorm1d, BatchNorm2d, BatchNorm3d
from .errors import LabError

MODELS = ("mlp", "cnn")
HIDDEN_UNITS, MANY_UNITS = 100, 200
CNN_CHANNELS = (16, 32, 64)
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (BatchNorm1d, BatchNorm2d, BatchNorm3d)
_POOLS = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)


def build(
    name: str,
    shape: tuple[int, ...],
    classes: int,
    *,
    norm: bool = True,
    seed: int = 0,
    wide: bool = False,
    std: float | None = None,
) -> nn.Sequential:
    """The network of that name, its weights drawn from the seed alone: with and without `norm` they are the same.

    Args:
        name: "mlp" or "cnn".
        shape: of one sample: (F,) features, or (C, *) with one to three dimensions of space.
        classes: size of the output, one logit a class.
        norm: put a batch-norm layer before each activation. Without one the layer before it has a bias, which starts
            at 0; with one it has none, since the batch mean that is subtracted would cancel it.
        wide: "mlp" has 200 ReLU units in a layer, not 100 sigmoid ones: from random weights that stay as they are,
            gamma and beta choose among features, so there have to be many.
        std: "mlp" draws its weights from a Gaussian of that standard deviation; None for Xavier's rule.
        seed: of the initial weights. The global generator is neither used nor moved.
    Raises:
        LabError: no such network.

    Example:
        >>> print(build("mlp", (1, 8, 8), classes=10)[:4])
        Sequential(
          (flatten): Flatten(start_dim=1, end_dim=-1)
          (linear1): Linear(in_features=64, out_features=100, bias=False)
          (bn1): BatchNorm1d(100, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True)
          (sigmoid1): Sigmoid()
        )
    """
    if name not in MODELS:
        raise LabError(f"no model {name!r}; there are {', '.join(MODELS)}")
    with torch.random.fork_rng(devices=[]):  # torch.nn draws initial weights of its own, which ours replace
        model = _mlp(shape, classes, norm, wide) if name == "mlp" else _cnn(shape, classes, norm)
    generator = Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, (nn.Linear, *_CONVS)):
            if name == "mlp" and std is not None:
                nn.init.normal_(module.weight, std=std, generator=generator)
            elif name == "mlp":
                nn.init.xavier_normal_(module.weight, generator=generator)
            else:
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model


def _mlp(shape: tuple[int, ...], classes: int, norm: bool, wide: bool) -> nn.Sequential:
    """Three hidden layers of 100 sigmoid units: the network of Ioffe & Szegedy 2015, section 4.1; or a wider one."""
    units, act, name = (MANY_UNITS, nn.ReLU, "relu") if wide else (HIDDEN_UNITS, nn.Sigmoid, "sigmoid")
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    width = math.prod(shape)
    for i in (1, 2, 3):
        layers[f"linear{i}"] = nn.Linear(width, units, bias=not norm)
        if norm:
            layers[f"bn{i}"] = BatchNorm1d(units)
        layers[f"{name}{i}"] = act()
        width = units
    layers["output"] = nn.Linear(width, classes)
    return nn.Sequential(layers)


def _cnn(shape: tuple[int, ...], classes: int, norm: bool) -> nn.Sequential:
    """Three 3x3 convolutions with ReLU, the later two of stride 2, the mean over space, and a linear layer."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    if len(shape) == 1:  # features are a sequence of one channel
        layers["unflatten"] = nn.Unflatten(1, (1, shape[0]))
        shape = (1, *shape)
    rank = len(shape) - 1
    conv, batch_norm, pool = _CONVS[rank - 1], _NORMS[rank - 1], _POOLS[rank - 1]
    channels = shape[0]
    for i, width in enumerate(CNN_CHANNELS, 1):
        layers[f"conv{i}"] = conv(channels, width, 3, stride=1 if i == 1 else 2, padding=1, bias=not norm)
        if norm:
            layers[f"bn{i}"] = batch_norm(width)
        layers[f"relu{i}"] = nn.ReLU()
        channels = width
    layers["pool"], layers["flatten"] = pool(1), nn.Flatten()
    layers["output"] = nn.Linear(channels, classes)
    return nn.Sequential(layers)
