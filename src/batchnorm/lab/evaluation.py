"""What a trained arm is worth: accuracy and loss, every single pair's accuracy, and a digest of the weights."""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .arms import PairPerBatch

# Every single pair is evaluated, but on at most so many test samples: CIFAR-10 in batches of 60 has 834 pairs.
SINGLE_PAIR_SAMPLES = 2000
_ROWS = 2000


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
