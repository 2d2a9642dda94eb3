"""Moments(count, mean, m2): what batch normalization measures, in the one form that merges exactly."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """Count, mean and sum of squared deviations of each channel over a set of samples.

    The moments of two sets merge exactly into those of their union, so the same small type serves a batch, a masked
    batch, the ranks of a process group, micro-batches, and a pass over a whole data set. Merge Moments to get a
    variance: the average of variances lacks the spread between the means, and E[x^2] - E[x]^2 loses all its digits when
    the mean is large.

    Attributes:
        count: int64, () or (C,): how many values each channel has. Exact; 0 is the identity of `merge`.
        mean: float64, (C,). 0 where count is 0.
        m2: float64, (C,): sum of (x - mean)^2, never negative unless the input is not finite.

    Source: Chan, Golub & LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample variances".

    Example:
        >>> x = torch.tensor([[1.0], [2.0], [3.0], [6.0]])
        >>> whole = Moments.measure(x)
        >>> whole.mean.item(), whole.variance().item(), whole.variance(unbiased=True).item()
        (3.0, 3.5, 4.666666666666667)
        >>> parts = Moments.measure(x[:1]).merge(Moments.measure(x[1:]))
        >>> parts.mean.item(), parts.m2.item()
        (3.0, 14.0)
    """

    count: Tensor
    mean: Tensor
    m2: Tensor

    @classmethod
    def empty(cls, num_features: int, device: torch.device | str | None = None) -> Moments:
        """Moments of no samples at all: the identity of `merge`.

        Args:
            num_features: C, the number of channels.
            device: where the tensors live.
        """
        zeros = torch.zeros(num_features, dtype=torch.float64, device=device)
        return cls(torch.zeros((), dtype=torch.int64, device=device), zeros, zeros.clone())

    @classmethod
    def measure(cls, x: Tensor, mask: Tensor | None = None) -> Moments:
        """Moments of each channel of x over all other dimensions, accumulated in float64 around the mean.

        Differentiable with respect to x.

        Args:
            x: (N, C, *), floating point, any strides. N or * may be empty.
            mask: bool, broadcastable to x without its channels, (N, *): True counts. Values where it is False are not
                read, NaN included.

        Raises:
            ValueError: x has fewer than 2 dimensions, or the mask is not bool or does not broadcast to (N, *).
        """
        if x.dim() < 2:
            raise ValueError(f"expected an input of at least 2 dimensions, (N, C, *), but got {tuple(x.shape)}")
        over = [d for d in range(x.dim()) if d != 1]
        values = x.double()
        if mask is None:
            count = torch.full((), x.numel() // max(x.size(1), 1), dtype=torch.int64, device=x.device)
        else:
            mask = broadcast_mask(mask, x)
            values = torch.where(mask, values, 0.0)
            count = mask.sum()
        divisor = count.clamp(min=1)
        mean = values.sum(over) / divisor
        centered = values - mean.view(per_channel(x))
        if mask is not None:
            centered = torch.where(mask, centered, 0.0)
        return cls(count, mean, centered.square().sum(over))

    def merge(self, *others: Moments) -> Moments:
        """Moments of the union of this set of samples and the others, merged in the order given.

            n = n_a + n_b;  d = mean_b - mean_a;  mean = mean_a + d * n_b / n;  m2 = m2_a + m2_b + d^2 * n_a * n_b / n

        Args:
            others: moments with the same number of channels, of samples that are not in this set.

        Raises:
            ValueError: the numbers of channels differ.
        """
        merged = self
        for other in others:
            merged = _merge_two(merged, other)
        return merged

    def merged(self) -> Moments:
        """Moments of the union of G sets whose moments are stacked, all at once.

        Merges count, mean and m2 of shape (G, C) (count also (G, 1)) into (C,): those of virtual batches, or of ranks.

        Example:
            >>> x = torch.tensor([[[1.0], [2.0]], [[3.0], [6.0]]])  # two sets of two values
            >>> each = [Moments.measure(values) for values in x]
            >>> stacked = Moments(*(torch.stack([getattr(m, of) for m in each]) for of in ("count", "mean", "m2")))
            >>> union = Moments(stacked.count[:, None], stacked.mean, stacked.m2).merged()
            >>> union.mean.item(), union.m2.item()
            (3.0, 14.0)
        """
        count = self.count.sum(0)
        if self.mean.size(0) == 0:
            return Moments(count, self.mean.sum(0), self.m2.sum(0))
        present = self.count > 0
        share = self.count / count.clamp(min=1).double()
        # Around one of the means, not around 0: the averaged numbers are then only as large as the means differ.
        first = self.mean.gather(0, present.expand_as(self.mean).int().argmax(0, keepdim=True))
        mean = first[0] + torch.where(present, (self.mean - first) * share, 0.0).sum(0)
        delta = torch.where(present, self.mean - mean, 0.0)
        return Moments(count, mean, (self.m2 + delta.square() * self.count).sum(0))

    def variance(self, unbiased: bool = False) -> Tensor:
        """Variance of each channel, (C,) float64; NaN where there are too few values to have one.

        Args:
            unbiased: divide by count - 1, as for a running variance, instead of by count, as for normalizing a batch.
        """
        divisor = self.count - 1 if unbiased else self.count
        return torch.where(divisor > 0, self.m2 / divisor, torch.nan)


def _merge_two(a: Moments, b: Moments) -> Moments:
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"cannot merge moments of {a.mean.numel()} channels with moments of {b.mean.numel()}")
    count = a.count + b.count
    share = b.count / count.clamp(min=1).double()
    delta = b.mean - a.mean
    # An empty side contributes exactly nothing, even where the other side is not finite (inf * 0 would be NaN).
    delta = torch.where((a.count == 0) | (b.count == 0), 0.0, delta)
    mean = torch.where(a.count == 0, b.mean, a.mean + delta * share)
    return Moments(count, mean, a.m2 + b.m2 + delta.square() * (a.count * share))


def per_channel(x: Tensor) -> list[int]:
    """Shape that lets a (C,) vector broadcast against x of shape (N, C, *): [1, C, 1, ...]."""
    return [1, -1] + [1] * (x.dim() - 2)


def broadcast_mask(mask: Tensor, x: Tensor) -> Tensor:
    """The mask expanded to (N, 1, *), so that it broadcasts against x of shape (N, C, *).

    Args:
        mask: bool, broadcastable to x without its channels: (N, *), or fewer dimensions counted from the right.
        x: (N, C, *).

    Raises:
        ValueError: the mask is not bool, or does not broadcast.
    """
    target = torch.Size((x.size(0), *x.shape[2:]))
    if mask.dtype != torch.bool:
        raise ValueError(f"expected a bool mask (True counts), but got {mask.dtype}; convert it, as in mask.bool()")
    if not broadcasts(mask.shape, target):
        raise ValueError(
            f"expected a mask that broadcasts to the input without its channels, {list(target)}, but got "
            f"{list(mask.shape)} for an input of {list(x.shape)}{_without_channels(mask, x)}"
        )
    return mask.expand(target).unsqueeze(1)


def broadcasts(shape: torch.Size, target: torch.Size) -> bool:
    """Whether a tensor of this shape may be expanded to the target's."""
    try:
        return shape == target or torch.broadcast_shapes(shape, target) == target
    except RuntimeError:
        return False


def _without_channels(mask: Tensor, x: Tensor) -> str:
    """The cure if the mask only has an extra dimension of channels."""
    kept = list(mask.shape[:1] + mask.shape[2:])
    return "; leave out its dimension of channels, as in mask[:, 0]" if kept == [x.size(0), *x.shape[2:]] else ""


def mask_of_lengths(lengths: Tensor, x: Tensor, channel_dim: int = 1, mask: Tensor | None = None) -> Tensor:
    """The mask, (N, L), of sequences whose first `lengths` values count, combined with another mask if there is one.

    Args:
        lengths: integers, (N,), from 0 to L.
        x: (N, C, L), or (N, L, C) where channel_dim says so.
        channel_dim: the dimension of the channels.
        mask: bool, broadcastable to (N, L).

    Raises:
        TypeError: lengths are no tensor.
        ValueError: x does not have exactly one dimension besides batch and channels; lengths are not N integers from 0
            to L (values are checked on the CPU only, where reading them costs nothing).
    """
    if x.dim() != 3:
        raise ValueError(
            f"lengths need an input of sequences, (N, C, L), but got {tuple(x.shape)}; pass a mask instead"
        )
    if not isinstance(lengths, Tensor):
        raise TypeError(f"expected lengths as a tensor, but got {type(lengths).__name__}; pass torch.tensor(lengths)")
    if lengths.shape != x.shape[:1] or lengths.is_floating_point() or lengths.dtype == torch.bool:
        raise ValueError(f"expected {x.size(0)} integer lengths, but got {lengths.dtype} of {tuple(lengths.shape)}")
    longest = x.size(3 - channel_dim % 3)
    if _readable(lengths) and ((lengths < 0) | (lengths > longest)).any():
        raise ValueError(
            f"lengths must be from 0 to {longest} for an input of {tuple(x.shape)}, but got {lengths.tolist()}; if a "
            "layer before this one has a stride, divide the lengths by it too"
        )
    positions = torch.arange(longest, device=x.device)
    counts = positions < lengths.to(x.device).unsqueeze(1)
    return counts if mask is None else counts & mask


def _readable(values: Tensor) -> bool:
    """Whether values can be read now: without waiting for a device, and while nothing traces or transforms."""
    traced = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
    transformed = torch._C._are_functorch_transforms_active()
    return values.is_cpu and type(values) is Tensor and not (traced or transformed)
