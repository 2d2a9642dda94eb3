"""BatchNorm1d, BatchNorm2d, BatchNorm3d: torch.nn's layers with our forward and backward."""

from __future__ import annotations

from torch import nn

from .public import OptionsByName


class BatchNorm1d(OptionsByName, nn.BatchNorm1d):
    """Batch normalization of (N, C) or (N, C, L): a drop-in for torch.nn.BatchNorm1d.

        y = gamma * (x - mean(batch)) / sqrt(var(batch) + eps) + beta

    mean and var are measured on every batch and replaced by the next; running_mean and running_var track them for eval;
    gamma and beta (`weight` and `bias`) are parameters like any other, shared by all batches, moved by the optimizer.

    Args:
        num_features: C.
        eps: added to the variance, in units of x squared.
        momentum: share of the new in the running statistics; None for the average over all batches.
        affine: learn gamma and beta; else 1 and 0.
        track_running_stats: keep running statistics; else measure in eval too.
        device, dtype: of parameters and buffers.
        bias: with affine, learn beta; else gamma alone.
        activation: fused after it, as in `batch_norm`: None, a name such as "relu", or the torch.nn module of it.
        virtual_batch_size: measure and normalize so many items of a batch at a time ("ghost batches"), the last ones
            together if fewer, one value with those before it; the running statistics follow the whole batch's.
        renorm: batch renormalization, see `Renorm`.
        sync: in training, measure over the batches of all ranks of `process_group` (None: all processes).
        nonfinite: of a channel whose statistics are NaN or infinite, the running ones "propagate" them, "skip" them
            (counted in `skipped`), or "raise" a RuntimeError first.
        singleton: one value per channel in training: "raise", or normalize it with the "running" statistics.
        channel_dim: where the channels are: 1, or another after the batch, as -1 for (N, L, C).
        center, scale: with affine, learn beta, learn gamma (Keras's names; center=False is bias=False).
        decay: 1 - momentum, in its place (Keras calls that momentum).
        unbiased: track the unbiased variance; False: the biased one, as Keras does.
        initializers: for any of weight, bias, running_mean and running_var a number, or a function that fills the
            tensor it is given, as those of torch.nn.init.

    Raises:
        ValueError: the input has another number of dimensions; one value per channel in training; unknown activation;
            options that exclude each other.
        RuntimeError: another number of channels than num_features; with nonfinite="raise", NaN or infinite statistics.
        IndexError: the input has no dimension channel_dim.
        NotImplementedError: renorm in a recomputation by activation checkpointing.

    Source: Ioffe & Szegedy 2015. Parameters, buffers, state_dict and defaults are torch.nn's.

    Example:
        >>> layer = BatchNorm1d(3, activation="relu")
        >>> layer(torch.randn(8, 3)).shape, layer.gamma.shape, int(layer.num_batches_tracked)
        (torch.Size([8, 3]), torch.Size([3]), 1)
    """


class BatchNorm2d(OptionsByName, nn.BatchNorm2d):
    """Batch normalization of (N, C, H, W): a drop-in for torch.nn.BatchNorm2d.

        y = gamma * (x - mean(batch)) / sqrt(var(batch) + eps) + beta

    mean and var are measured on every batch and replaced by the next; running_mean and running_var track them for eval;
    gamma and beta (`weight` and `bias`) are parameters like any other, shared by all batches, moved by the optimizer.

    Args:
        num_features: C.
        eps: added to the variance, in units of x squared.
        momentum: share of the new in the running statistics; None for the average over all batches.
        affine: learn gamma and beta; else 1 and 0.
        track_running_stats: keep running statistics; else measure in eval too.
        device, dtype: of parameters and buffers.
        bias: with affine, learn beta; else gamma alone.
        activation: fused after it, as in `batch_norm`: None, a name such as "relu", or the torch.nn module of it.
        virtual_batch_size: measure and normalize so many items of a batch at a time ("ghost batches"), the last ones
            together if fewer, one value with those before it; the running statistics follow the whole batch's.
        renorm: batch renormalization, see `Renorm`.
        sync: in training, measure over the batches of all ranks of `process_group` (None: all processes).
        nonfinite: of a channel whose statistics are NaN or infinite, the running ones "propagate" them, "skip" them
            (counted in `skipped`), or "raise" a RuntimeError first.
        singleton: one value per channel in training: "raise", or normalize it with the "running" statistics.
        channel_dim: where the channels are: 1, or another after the batch, as -1 for (N, L, C).
        center, scale: with affine, learn beta, learn gamma (Keras's names; center=False is bias=False).
        decay: 1 - momentum, in its place (Keras calls that momentum).
        unbiased: track the unbiased variance; False: the biased one, as Keras does.
        initializers: for any of weight, bias, running_mean and running_var a number, or a function that fills the
            tensor it is given, as those of torch.nn.init.

    Raises:
        ValueError: the input has another number of dimensions; one value per channel in training; unknown activation;
            options that exclude each other.
        RuntimeError: another number of channels than num_features; with nonfinite="raise", NaN or infinite statistics.
        IndexError: the input has no dimension channel_dim.
        NotImplementedError: renorm in a recomputation by activation checkpointing.

    Source: Ioffe & Szegedy 2015. Parameters, buffers, state_dict and defaults are torch.nn's.

    Example:
        >>> BatchNorm2d(3)
        BatchNorm2d(3, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True)
    """


class BatchNorm3d(OptionsByName, nn.BatchNorm3d):
    """Batch normalization of (N, C, D, H, W): a drop-in for torch.nn.BatchNorm3d.

        y = gamma * (x - mean(batch)) / sqrt(var(batch) + eps) + beta

    mean and var are measured on every batch and replaced by the next; running_mean and running_var track them for eval;
    gamma and beta (`weight` and `bias`) are parameters like any other, shared by all batches, moved by the optimizer.

    Args:
        num_features: C.
        eps: added to the variance, in units of x squared.
        momentum: share of the new in the running statistics; None for the average over all batches.
        affine: learn gamma and beta; else 1 and 0.
        track_running_stats: keep running statistics; else measure in eval too.
        device, dtype: of parameters and buffers.
        bias: with affine, learn beta; else gamma alone.
        activation: fused after it, as in `batch_norm`: None, a name such as "relu", or the torch.nn module of it.
        virtual_batch_size: measure and normalize so many items of a batch at a time ("ghost batches"), the last ones
            together if fewer, one value with those before it; the running statistics follow the whole batch's.
        renorm: batch renormalization, see `Renorm`.
        sync: in training, measure over the batches of all ranks of `process_group` (None: all processes).
        nonfinite: of a channel whose statistics are NaN or infinite, the running ones "propagate" them, "skip" them
            (counted in `skipped`), or "raise" a RuntimeError first.
        singleton: one value per channel in training: "raise", or normalize it with the "running" statistics.
        channel_dim: where the channels are: 1, or another after the batch, as -1 for (N, L, C).
        center, scale: with affine, learn beta, learn gamma (Keras's names; center=False is bias=False).
        decay: 1 - momentum, in its place (Keras calls that momentum).
        unbiased: track the unbiased variance; False: the biased one, as Keras does.
        initializers: for any of weight, bias, running_mean and running_var a number, or a function that fills the
            tensor it is given, as those of torch.nn.init.

    Raises:
        ValueError: the input has another number of dimensions; one value per channel in training; unknown activation;
            options that exclude each other.
        RuntimeError: another number of channels than num_features; with nonfinite="raise", NaN or infinite statistics.
        IndexError: the input has no dimension channel_dim.
        NotImplementedError: renorm in a recomputation by activation checkpointing.

    Source: Ioffe & Szegedy 2015. Parameters, buffers, state_dict and defaults are torch.nn's.

    Example:
        >>> BatchNorm3d(2)(torch.randn(2, 2, 3, 3, 3)).shape
        torch.Size([2, 2, 3, 3, 3])
    """
