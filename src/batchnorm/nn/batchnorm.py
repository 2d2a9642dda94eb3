"""BatchNorm1d, BatchNorm2d, BatchNorm3d: torch.nn's layers with our forward and backward."""

from __future__ import annotations

from torch import nn

from .public import OptionsByName


class BatchNorm1d(OptionsByName, nn.BatchNorm1d):
    """Batch normalization of (N, C) or (N, C, L): a drop-in for torch.nn.BatchNorm1d.

        y = gamma * (x - mean(batch)) / sqrt(var(batch) + eps) + beta

    mean and var are measured anew on every batch; running_mean and running_var track them for eval; gamma and beta
    (`weight` and `bias`) are ordinary parameters, shared by all batches and moved by the optimizer.

    Args:
        num_features: C.
        eps: added to the variance, in units of x squared.
        momentum: weight of the new batch in the running statistics; None for the average over all batches.
        affine: learn gamma and beta; else 1 and 0.
        track_running_stats: keep running statistics; else measure in eval too.
        device, dtype: of parameters and buffers.
        bias: with affine, learn beta; else gamma alone.
        activation: fused after the normalization: None, a name such as "relu", or a torch.nn module, as in
            `batch_norm`.
        virtual_batch_size: number of items that are measured and normalized together ("ghost batches"), as in
            `batch_norm`; the running statistics track those of the whole batch.
        renorm: batch renormalization, see `Renorm`.
        sync: in training, measure over the batches of all ranks of `process_group` (None: all processes).
        nonfinite: what to do if a channel's batch statistics are NaN or infinite: "propagate" them to the running
            statistics, "skip" them (counted in `skipped`), or "raise" a RuntimeError before anything moves.
        singleton: one value per channel in training: "raise", or normalize it with the "running" statistics.
        channel_dim: dimension of the channels, not 0: 1 by default, -1 for (N, L, C).
        center, scale: with affine, learn beta, learn gamma (Keras's names; center=False is bias=False).
        decay: 1 - momentum, instead of momentum (Keras calls it momentum).
        unbiased: track the unbiased variance; False: the biased one, as Keras does.
        initializers: for any of weight, bias, running_mean and running_var: a number, or a function that fills a given
            tensor, such as those of torch.nn.init.

    Raises:
        ValueError: the input has another number of dimensions; one value per channel in training; unknown activation;
            options that contradict each other.
        RuntimeError: the input does not have num_features channels; with nonfinite="raise", NaN or infinite statistics.
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

    mean and var are measured anew on every batch; running_mean and running_var track them for eval; gamma and beta
    (`weight` and `bias`) are ordinary parameters, shared by all batches and moved by the optimizer.

    Args:
        num_features: C.
        eps: added to the variance, in units of x squared.
        momentum: weight of the new batch in the running statistics; None for the average over all batches.
        affine: learn gamma and beta; else 1 and 0.
        track_running_stats: keep running statistics; else measure in eval too.
        device, dtype: of parameters and buffers.
        bias: with affine, learn beta; else gamma alone.
        activation: fused after the normalization: None, a name such as "relu", or a torch.nn module, as in
            `batch_norm`.
        virtual_batch_size: number of items that are measured and normalized together ("ghost batches"), as in
            `batch_norm`; the running statistics track those of the whole batch.
        renorm: batch renormalization, see `Renorm`.
        sync: in training, measure over the batches of all ranks of `process_group` (None: all processes).
        nonfinite: what to do if a channel's batch statistics are NaN or infinite: "propagate" them to the running
            statistics, "skip" them (counted in `skipped`), or "raise" a RuntimeError before anything moves.
        singleton: one value per channel in training: "raise", or normalize it with the "running" statistics.
        channel_dim: dimension of the channels, not 0: 1 by default, -1 for (N, L, C).
        center, scale: with affine, learn beta, learn gamma (Keras's names; center=False is bias=False).
        decay: 1 - momentum, instead of momentum (Keras calls it momentum).
        unbiased: track the unbiased variance; False: the biased one, as Keras does.
        initializers: for any of weight, bias, running_mean and running_var: a number, or a function that fills a given
            tensor, such as those of torch.nn.init.

    Raises:
        ValueError: the input has another number of dimensions; one value per channel in training; unknown activation;
            options that contradict each other.
        RuntimeError: the input does not have num_features channels; with nonfinite="raise", NaN or infinite statistics.
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

    mean and var are measured anew on every batch; running_mean and running_var track them for eval; gamma and beta
    (`weight` and `bias`) are ordinary parameters, shared by all batches and moved by the optimizer.

    Args:
        num_features: C.
        eps: added to the variance, in units of x squared.
        momentum: weight of the new batch in the running statistics; None for the average over all batches.
        affine: learn gamma and beta; else 1 and 0.
        track_running_stats: keep running statistics; else measure in eval too.
        device, dtype: of parameters and buffers.
        bias: with affine, learn beta; else gamma alone.
        activation: fused after the normalization: None, a name such as "relu", or a torch.nn module, as in
            `batch_norm`.
        virtual_batch_size: number of items that are measured and normalized together ("ghost batches"), as in
            `batch_norm`; the running statistics track those of the whole batch.
        renorm: batch renormalization, see `Renorm`.
        sync: in training, measure over the batches of all ranks of `process_group` (None: all processes).
        nonfinite: what to do if a channel's batch statistics are NaN or infinite: "propagate" them to the running
            statistics, "skip" them (counted in `skipped`), or "raise" a RuntimeError before anything moves.
        singleton: one value per channel in training: "raise", or normalize it with the "running" statistics.
        channel_dim: dimension of the channels, not 0: 1 by default, -1 for (N, L, C).
        center, scale: with affine, learn beta, learn gamma (Keras's names; center=False is bias=False).
        decay: 1 - momentum, instead of momentum (Keras calls it momentum).
        unbiased: track the unbiased variance; False: the biased one, as Keras does.
        initializers: for any of weight, bias, running_mean and running_var: a number, or a function that fills a given
            tensor, such as those of torch.nn.init.

    Raises:
        ValueError: the input has another number of dimensions; one value per channel in training; unknown activation;
            options that contradict each other.
        RuntimeError: the input does not have num_features channels; with nonfinite="raise", NaN or infinite statistics.
        IndexError: the input has no dimension channel_dim.
        NotImplementedError: renorm in a recomputation by activation checkpointing.

    Source: Ioffe & Szegedy 2015. Parameters, buffers, state_dict and defaults are torch.nn's.

    Example:
        >>> BatchNorm3d(2)(torch.randn(2, 2, 3, 3, 3)).shape
        torch.Size([2, 2, 3, 3, 3])
    """
