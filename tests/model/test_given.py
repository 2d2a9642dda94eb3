"""What a layer was given, as Moments: beside float64 on the samples that are there, wherever the channels are."""

import pytest
import torch
from lookalikes import BatchNormAct2d
from torch import nn

import batchnorm as bn
from batchnorm.model.given import UNKNOWN, count_given, moments_given

SCALE = torch.arange(1, 6.0)


def check(moments, samples):
    """Moments of samples, (n, C), in float64; the operators sum in float64 what they read in float32."""
    samples = samples.double()
    assert (moments.count == len(samples)).all()
    torch.testing.assert_close(moments.mean, samples.mean(0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(moments.variance(), samples.var(0, correction=0), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("length", [5, 7])
@pytest.mark.parametrize("layer", [bn.BatchNorm1d(5), nn.BatchNorm1d(5), bn.BatchNorm1d(5, channel_dim=-1)], ids=repr)
def test_channels_are_where_the_layer_has_them(layer, length):
    x = torch.randn(8, length, 5) * SCALE  # as many positions as channels, too
    last = getattr(layer, "channel_dim", 1) == -1
    given = x if last else x.transpose(1, 2)
    check(moments_given(layer, (given,), {}), x.flatten(0, 1))
    check(moments_given(layer, (), {"input": given}), x.flatten(0, 1))
    assert count_given(layer, (given,), {}) == 8 * length


@pytest.mark.parametrize("dim", [1, -1])
@pytest.mark.parametrize("how", ["mask", "positional", "lengths", "both"])
def test_only_what_counts_is_counted(dim, how):
    layer, x = bn.BatchNorm1d(5, channel_dim=dim, virtual_batch_size=4), torch.randn(8, 7, 5) * SCALE
    lengths = torch.tensor([7, 0, 3, 1, 7, 2, 5, 6])
    counts = torch.arange(7) < lengths[:, None]
    more = torch.rand(8, 7) < 0.7 if how == "both" else torch.ones(8, 7, dtype=torch.bool)
    given = x if dim == -1 else x.transpose(1, 2)
    args, kwargs = {
        "mask": ((given,), {"mask": counts}),
        "positional": ((given, None, counts), {}),
        "lengths": ((given,), {"lengths": lengths}),
        "both": ((given,), {"lengths": lengths, "mask": more}),
    }[how]
    check(moments_given(layer, args, kwargs), x[counts & more])
    assert count_given(layer, args, kwargs) == UNKNOWN


def test_the_arguments_of_a_converted_subclass_are_its_own():
    class Scaled(nn.BatchNorm2d):
        def forward(self, x, scale, mask):
            return super().forward(x) * scale + mask

    layer, x = bn.convert(Scaled(5)), torch.randn(4, 5, 3, 3)
    check(moments_given(layer, (x, 2.0, 1.0), {}), x.movedim(1, -1).reshape(-1, 5))
    assert count_given(layer, (x, 2.0), {"mask": 1.0}) == 36
    norm_act = bn.convert(BatchNormAct2d(5))
    check(moments_given(norm_act, (), {"x": x}), x.movedim(1, -1).reshape(-1, 5))
    assert count_given(norm_act, (), {"x": x}) == 36
