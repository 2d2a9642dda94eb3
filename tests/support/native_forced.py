"""The CPU as a device without kernels of ours, if the environment has NATIVE: layers run on torch's own operators.

torch's operators for synchronized batch normalization have no kernels for the CPU. Those here say what CUDA's compute,
line by line (aten/src/ATen/native/cuda/Normalization.cuh), the integer that counts the samples so far included.
"""

from __future__ import annotations

import os
from typing import Any

NATIVE = "BATCHNORM_TEST_NATIVE"
_kept: list[Any] = []  # a library's kernels live as long as it does


def if_asked() -> None:
    """Force it in this process if its environment says so; else torch is not imported."""
    if os.environ.get(NATIVE):
        force()


def force() -> None:
    """Force it in this process for good, before any layer is called."""
    from batchnorm.ops import cpu

    cpu.COMPILED = False
    if not _kept:
        register()


def register() -> None:
    """Give the CPU the operators that torch.nn.SyncBatchNorm runs on."""
    import torch

    def vectors(x, *tensors):
        """Each so that it broadcasts against x, in float64 for float64 and float32 else."""
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        return [None if t is None else t.to(dtype).view(1, -1, *[1] * (x.dim() - 2)) for t in tensors]

    def stats(x, eps):
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        var, mean = torch.var_mean(x.to(dtype), [d for d in range(x.dim()) if d != 1], correction=0)
        return mean, torch.rsqrt(var + eps)

    def gather(x, means, rstds, running_mean, running_var, momentum, eps, counts):
        assert counts.dtype == (x.dtype if running_mean is None else running_mean.dtype), "as CUDA insists"
        mean, var, n = torch.zeros_like(means[0]), torch.zeros_like(means[0]), 0
        for m, rstd, count in zip(means, rstds, counts, strict=True):
            v = ((1 / rstd).square() - eps) * count
            factor = 1 / (n + count)
            var = var + v + (mean - m) * (mean - m) * n * count * factor
            mean = n * factor * mean + count * factor * m
            n = int(n + count)
        total = torch.tensor(float(n))
        if running_mean is not None:
            running_mean.copy_((1 - momentum) * running_mean + momentum * mean)
            running_var.copy_((1 - momentum) * running_var + momentum * (var / (total - 1)))
        return mean, 1 / torch.sqrt(var / total + eps)

    def elemt(x, weight, bias, mean, rstd, eps):
        weight, bias, mean, rstd = vectors(x, weight, bias, mean, rstd)
        y = (x - mean) * rstd
        y = y if weight is None else y * weight
        return (y if bias is None else y + bias).to(x.dtype)

    def reduce(dy, x, mean, rstd, weight, want_sums, want_dweight, want_dbias):
        assert (want_sums, want_dweight, want_dbias) == (True, False, False)
        over = [d for d in range(x.dim()) if d != 1]
        centered, dy = x - vectors(x, mean)[0], dy.to(mean.dtype)
        nothing = torch.empty(0)
        return dy.sum(over), (dy * centered).sum(over), nothing, nothing

    def backward_elemt(dy, x, mean, rstd, weight, sum_dy, along, counts):
        assert counts.dtype == torch.int32
        n = counts.sum()
        along = along * rstd.square() / n
        mean, rstd, weight, sum_dy, along = vectors(x, mean, rstd, weight, sum_dy / n, along)
        return ((dy - sum_dy - (x - mean) * along) * rstd * (1 if weight is None else weight)).to(x.dtype)

    library = torch.library.Library("aten", "IMPL", "CPU")
    for name, kernel in (
        ("batch_norm_stats", stats),
        ("batch_norm_gather_stats_with_counts", gather),
        ("batch_norm_elemt", elemt),
        ("batch_norm_backward_reduce", reduce),
        ("batch_norm_backward_elemt", backward_elemt),
    ):
        library.impl(name, kernel)
    _kept.append(library)
