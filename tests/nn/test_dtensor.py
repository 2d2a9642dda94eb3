"""DTensors through our layers as through torch.nn's: values, gradients, placements, running statistics."""

import copy

import pytest
import ranks
import torch
import torch.distributed as dist
from cases import make
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor, init_device_mesh

import batchnorm as bn

pytestmark = pytest.mark.processes

PLACEMENTS = {"replicated": Replicate(), "batch": Shard(0), "channels": Shard(1)}
KINDS = {(4, 4): "BatchNorm1d", (4, 4, 6): "BatchNorm1d", (4, 4, 3, 2): "BatchNorm2d"}
OPTIONS = {"usual": {}, "not affine": {"affine": False}, "untracked": {"track_running_stats": False}}
CASES = [
    (shape, where, training, options, fused)
    for shape in KINDS
    for where in PLACEMENTS
    for training in (True, False)
    for options, fused in (*((name, False) for name in OPTIONS), ("usual", True))
]


def layers(shape, options, fused):
    """torch.nn's, with what comes after it, and ours."""
    torch.manual_seed(0)
    theirs = getattr(nn, KINDS[shape])(4, **OPTIONS[options])
    for tensor in (*theirs.parameters(), *theirs.buffers()):
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.5, 1.5)
    ours = getattr(bn, KINDS[shape])(4, **OPTIONS[options], activation="relu" if fused else None)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def step(layer, shape, place, call):
    """Every tensor of a step, by name: placements, and the whole of its values."""
    torch.manual_seed(1)
    x, residual, dy = (place(make(shape)) for _ in range(3))
    x.requires_grad_()
    y = call(layer, x, residual)
    y.backward(dy)
    found = {"y": y.detach(), "dx": x.grad, **dict(layer.named_buffers())}
    found |= {f"d{name}": parameter.grad for name, parameter in layer.named_parameters()}
    return {
        name: (str(t.placements), t.full_tensor()) if isinstance(t, DTensor) else ("", t) for name, t in found.items()
    }


def fused_call(layer, x, residual):
    return layer(x, residual) if isinstance(layer, bn.BatchNorm1d | bn.BatchNorm2d) else (layer(x) + residual).relu()


def plain_call(layer, x, _):
    return layer(x)


def each_case(rank):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    found = []
    for shape, where, training, options, fused in CASES:
        call, both = fused_call if fused else plain_call, layers(shape, options, fused)
        whole = step(copy.deepcopy(both[0]).train(training), shape, lambda t: t, call)

        def place(t, where=where):
            return distribute_tensor(t, mesh, [PLACEMENTS[where]])

        found.append((whole, *(step(distribute_module(m, mesh).train(training), shape, place, call) for m in both)))
    layer, (x, *_) = bn.BatchNorm1d(4), [distribute_tensor(make((4, 4)), mesh, [Replicate()])]
    with pytest.raises(RuntimeError, match=r"got mixed torch\.Tensor and DTensor"):  # as torch.nn's does
        layer(x)
    layer = distribute_module(layer, mesh)
    layer(x)
    moments = bn.Moments.measure(x.full_tensor())
    torch.testing.assert_close(layer.measured.mean.full_tensor(), moments.mean, rtol=1e-6, atol=1e-6)
    return found


@pytest.mark.parametrize("world", [1, 2])
def test_as_torch_nns_layers(world):
    for found in ranks.run(each_case, world):
        for case, (whole, theirs, ours) in zip(CASES, found, strict=True):
            assert theirs.keys() == ours.keys() == whole.keys()
            for name, (placements, values) in ours.items():
                message = f"{name} of {case}"
                assert placements == theirs[name][0], message
                if not (case[1] == "channels" and name.startswith("running")):
                    assert torch.equal(values, theirs[name][1]), message
                # float32 sums of 4 to 24 values of size 1, in another order
                torch.testing.assert_close(values, whole[name][1], rtol=1e-5, atol=1e-5, msg=message)


def channels_sharded(rank):
    mesh = init_device_mesh("cpu", (2,))
    layer = distribute_module(nn.BatchNorm1d(4), mesh)
    layer(distribute_tensor(make((8, 4)), mesh, [Shard(1)]))
    return layer.running_mean.full_tensor()


def test_torch_nns_running_statistics_stay_where_channels_are_sharded():
    """Why ours are moved by other means there: once this fails, torch's operator can be trusted with them."""
    assert ranks.run(channels_sharded, 2)[0].eq(0).all()
