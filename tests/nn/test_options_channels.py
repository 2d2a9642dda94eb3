"""channel_dim=: channels anywhere after the batch, without a transposed copy of the input."""

import pytest
import torch
from cases import make
from compare import assert_close
from stepping import assert_step, randomize
from torch import nn
from torch.profiler import profile

import batchnorm as bn

# class, shape of x, where its channels (3 of them) are
CASES = [
    (bn.BatchNorm1d, (7, 3), -1),
    (bn.BatchNorm1d, (7, 3), 1),
    (bn.BatchNorm1d, (6, 5, 3), -1),
    (bn.BatchNorm1d, (6, 5, 3), 2),
    (bn.BatchNorm2d, (4, 5, 6, 3), -1),
    (bn.BatchNorm2d, (4, 5, 6, 3), 3),
    (bn.BatchNorm2d, (4, 5, 3, 6), 2),
    (bn.BatchNorm2d, (4, 5, 3, 6), -2),
    (bn.BatchNorm3d, (3, 2, 3, 4, 3), -1),
    (bn.BatchNorm3d, (3, 2, 4, 3, 4), 3),
]
IDS = [f"{shape}[{dim}]" for _, shape, dim in CASES]
OPTIONS = [{}, {"virtual_batch_size": 2, "activation": "relu"}, {"nonfinite": "skip", "unbiased": False}]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dressed", [True, False])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("cls", "shape", "dim"), CASES, ids=IDS)
def test_values_gradients_and_tracking(cls, shape, dim, options, dressed, training):
    """Dressed: with a residual and a mask."""
    layer = randomize(cls(3, channel_dim=dim, **options)).train(training)
    x, given = make(shape), {}
    if dressed:
        mask = torch.rand(x.select(dim, 0).shape) < 0.7
        given = {"mask": mask, "residual": make(shape)}
        x = torch.where(mask.unsqueeze(dim if dim > 0 else len(shape) + dim), x, torch.nan)
    y = assert_step(layer, x, **given)
    assert y.stride() == x.stride()


@pytest.mark.parametrize(("cls", "shape", "dim"), CASES, ids=IDS)
def test_a_permuted_view_of_channels_first_is_as_good(cls, shape, dim):
    layer = randomize(cls(3, channel_dim=dim, activation="silu"))
    x = make(shape).movedim(dim, 1).contiguous().movedim(1, dim)
    y = assert_step(layer, x, residual=make(shape))
    assert y.stride() == x.stride()


def test_strides_of_any_kind_and_low_precision():
    for x in (make((6, 10, 3))[:, ::2], make((6, 3))[:, None].expand(6, 5, 3), make((3, 5, 6)).transpose(0, 2)):
        assert_step(randomize(bn.BatchNorm1d(3, channel_dim=-1)), x)
        assert_step(randomize(bn.BatchNorm1d(3, channel_dim=-1)), x.bfloat16())


def test_renorm_is_that_of_channels_first():
    layer, first = (randomize(bn.BatchNorm1d(3, renorm=bn.Renorm(1.2, 0.3), channel_dim=d)) for d in (-1, 1))
    first.load_state_dict(layer.state_dict())
    x = make((6, 5, 3))
    assert_close(layer(x), first(x.movedim(-1, 1).double().float()).movedim(1, -1).double())
    assert_close(layer.running_var, first.running_var.double())


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize(("cls", "shape", "dim"), CASES, ids=IDS)
def test_no_copy_is_made_of_the_input(cls, shape, dim, contiguous):
    layer = cls(3, channel_dim=dim)
    x = make(shape)
    x = (x if contiguous else x.movedim(dim, 1).contiguous().movedim(1, dim)).requires_grad_()
    kept = []
    keeping = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)
    with keeping, profile(acc_events=True) as seen:  # up to torch 2.12, it warns that it will not
        y = layer(x)
    assert [t.data_ptr() for t in kept if t.numel() == x.numel()] == [x.data_ptr()]
    assert not {event.key for event in seen.key_averages()} & {"aten::copy_", "aten::contiguous", "aten::clone"}
    assert y.shape == x.shape


@pytest.mark.slow
def test_second_derivatives_transforms_and_compile():
    layer = bn.BatchNorm1d(2, channel_dim=-1, dtype=torch.float64, track_running_stats=False)
    x = make((4, 3, 2), torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(layer, x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(layer, x)
    torch.testing.assert_close(torch.func.vmap(layer)(torch.stack((x, x)))[1], layer(x))
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for t in (x, make((5, 7, 2), torch.float64)):
        torch.testing.assert_close(compiled(t), layer(t), rtol=1e-12, atol=1e-12)


def test_an_eval_model_exports_with_the_standard_operator():
    layer = randomize(bn.BatchNorm1d(3, channel_dim=-1, virtual_batch_size=2)).eval()
    x = make((4, 5, 3))
    program = torch.export.export(layer, (x,))
    assert "ops.aten.batch_norm" in program.graph_module.code
    torch.testing.assert_close(program.module()(x), layer(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "given", "message"),
    [
        ((4, 3, 5), {}, r"dimension 1 is 3 in \(4, 3, 5\).*in dimension 2\? Then build the layer with channel_dim=2"),
        ((4, 3, 5), {"channel_dim": 1, "affine": False}, "channel_dim=2"),
        ((4, 5, 3), {"channel_dim": -1}, r"dimension 2 is 3 in \(4, 5, 3\).*with channel_dim=1$"),
        ((4, 3), {"channel_dim": -1}, r"should contain 3 elements not 5.*dimension 1 is 3 in \(4, 3\)"),
    ],
)
def test_channels_elsewhere_raise_and_name_the_dimension(shape, given, message):
    layer = bn.BatchNorm1d(5, **given)
    with pytest.raises(RuntimeError, match=message):
        layer(make(shape))
    assert int(layer.num_batches_tracked) == 0


@pytest.mark.parametrize(
    ("dim", "shape"), [(2, (4, 3)), (-2, (4, 3)), (3, (4, 3, 5)), (-3, (4, 3, 5)), (-4, (4, 3, 5))]
)
def test_a_dimension_that_is_not_there_raises(dim, shape):
    with pytest.raises(IndexError, match=f"channel_dim={dim} must be a dimension after the batch's"):
        bn.BatchNorm1d(3, channel_dim=dim)(make(shape))


@pytest.mark.parametrize("shape", [(3,), (2, 3, 4, 5)])
def test_the_number_of_dimensions_is_checked_as_by_torch(shape):
    with pytest.raises(ValueError, match="expected 2D or 3D input"):
        nn.BatchNorm1d(3)(make(shape))
    with pytest.raises(ValueError, match="expected 2D or 3D input"):
        bn.BatchNorm1d(3, channel_dim=-1)(make(shape))


@pytest.mark.parametrize("mask", [torch.ones(4, 3, dtype=torch.bool), torch.ones(4, 5)])
def test_a_mask_that_does_not_fit_raises(mask):
    with pytest.raises(ValueError, match="mask"):
        bn.BatchNorm1d(3, channel_dim=-1)(make((4, 5, 3)), mask=mask)
