"""The one way numbers are compared in the tests: against float64, with the error of a peer as the yardstick."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_close(
    ours: Tensor, exact: Tensor, *, peer: Tensor | None = None, ulps: float = 4.0, scale: float | None = None
) -> None:
    """Assert that ours is as near to the exact values as its dtype, or twice a peer's error, allows.

    The bound is ulps * eps(dtype of ours) * scale + 2 * max|peer - exact|, where scale is by default the largest finite
    |exact| (at least 1): errors of sums are relative to what was summed, not to each result.

    Args:
        ours: what is tested.
        exact: the oracle's values, float64, of the same shape.
        peer: another implementation's values for the same thing.
        ulps: how many units in the last place, of a number of size `scale`, ours may be off on its own account.
        scale: size of the numbers that were added up.
    """
    __tracebackhide__ = True
    assert ours.shape == exact.shape, f"shapes differ: {tuple(ours.shape)} and {tuple(exact.shape)}"
    assert exact.dtype == torch.float64, f"the exact values must be float64, not {exact.dtype}"
    mine = ours.detach().double()
    assert torch.equal(mine.isnan(), exact.isnan()), "NaN in different places"
    finite = exact.isfinite()
    assert torch.equal(mine[~finite & ~exact.isnan()], exact[~finite & ~exact.isnan()]), "infinities differ"
    mine, exact = mine[finite], exact.detach()[finite]
    if exact.numel() == 0:
        return
    if scale is None:
        scale = max(1.0, exact.abs().max().item())
    bound = ulps * torch.finfo(ours.dtype).eps * scale
    if peer is not None:
        assert peer.detach()[finite].isfinite().all(), "the peer is not finite where the exact values are"
        bound += 2 * (peer.detach().double()[finite] - exact).abs().max().item()
    worst = (mine - exact).abs().max().item()
    assert worst <= bound, f"largest error {worst:.3g} is over the bound {bound:.3g}"
