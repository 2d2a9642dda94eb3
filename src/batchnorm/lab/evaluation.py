"""What a trained arm is worth: accuracy and loss, what reaches a hidden unit, each pair's accuracy, a digest."""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .arms import PairPerBatch

# Every single pair is evaluated, but on at most so many test samples: CIFAR-10 in batches of 60 has 834 pairs.
SINGLE_PAIR_SAMPLES = 2000
_ROWS = 2000
# Of what reaches the unit below: those of the paper's figure 1.
INPUT_PERCENTILES = {"input_p15": 0.15, "input_p50": 0.5, "input_p85": 0.85}
UNIT = 0  # named before anything was trained, so that it is as typical as any


@torch.no_grad()
def evaluate(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Accuracy, 0 to 1, and mean cross-entropy in nats of the model, which is left in eval mode.

    Args:
        x: (N, *) samples.
        y: (N,) int64, their classes.
    """
    model.eval()
    right, loss = 0, 0.0
    for rows, classes in zip(x.split(_ROWS), y.split(_ROWS), strict=True):
        logits = model(rows)
        right += int((logits.argmax(1) == classes).sum())
        loss += F.cross_entropy(logits, classes, reduction="sum").item()
    return right / len(y), loss / len(y)


@contextmanager
def input_percentiles(model: nn.Sequential) -> Iterator[dict[str, float]]:
    """A dict that at the block's end has percentiles of what reached one unit of the last hidden layer.

    It is the input to the unit's activation: what batch norm gives out, or without one what the linear layer does.
    Empty where the module before the output is not an activation of (N, units).
    """
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor]) -> None:
        seen.append(args[0][:, UNIT].detach().double())

    percentiles: dict[str, float] = {}
    handle = model[-2].register_forward_pre_hook(keep) if isinstance(model[-2], (nn.Sigmoid, nn.ReLU)) else None
    try:
        yield percentiles
    finally:
        if handle:
            handle.remove()
    if seen:
        values = torch.cat(seen)
        percentiles |= {name: values.quantile(share).item() for name, share in INPUT_PERCENTILES.items()}


def evaluate_single_pairs(model: nn.Module, pairs: PairPerBatch, x: Tensor, y: Tensor) -> dict[str, Any]:
    """Accuracy with the pair of each batch in turn: {"min", "median", "max", "all", "samples"}.

    Args:
        x: (N, *) test samples, of which the first `SINGLE_PAIR_SAMPLES` are used.
        y: (N,) int64, their classes.
    """
    x, y = x[:SINGLE_PAIR_SAMPLES], y[:SINGLE_PAIR_SAMPLES]
    accuracies = []
    for batch in range(pairs.batches):
        pairs.select(batch)
        accuracies.append(evaluate(model, x, y)[0])
    pairs.select_average()
    low, high = min(accuracies), max(accuracies)
    return {
        "min": low,
        "median": statistics.median(accuracies),
        "max": high,
        "all": accuracies,
        "samples": len(y),
    }


def weights_sha256(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Digest of names, dtypes, shapes and every bit of the tensors, in the order given."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
