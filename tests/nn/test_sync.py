"""Synchronized layers in real processes: the ranks together compute what one process computes on the whole batch."""

from __future__ import annotations

import pytest
import ranks
import torch
from cases import laid_out, make
from compare import assert_close

import batchnorm as bn
from batchnorm import activations, reference
from batchnorm.moments import Moments

pytestmark = pytest.mark.processes

C = 4
BATCHES = [3, 0, 5, 1]  # uneven, one of them empty
CASES = {
    "plain": {},
    "vectors": {"shape": ()},
    "float64": {"dtype": torch.float64},
    "far_mean": {"mean": 1e4},
    "channels_last": {"layout": "channels_last"},
    "mask": {"masked": True},
    "residual_relu": {"residual": True, "activation": "relu"},
    "mask_residual_gelu": {"masked": True, "residual": True, "activation": "gelu"},
    "not_affine": {"affine": False},
    "cumulative": {"momentum": None},
    "untracked": {"track_running_stats": False},
    "autocast": {"autocast": True},
}


def parts(case, world):
    """Each rank's x, dy, residual and mask; the same on every call."""
    torch.manual_seed(len(case))
    options, found = CASES[case], []
    dtype = torch.bfloat16 if options.get("autocast") else options.get("dtype", torch.float32)
    for rank, n in enumerate(BATCHES[:world]):
        shape = (n, C, *options.get("shape", (3, 2)))
        x = laid_out(make(shape, dtype, mean=options.get("mean", 1.0) + rank), options.get("layout", "contiguous"))
        mask = torch.rand(n, *shape[2:]) > 0.4 if options.get("masked") else None
        if mask is not None:
            x = torch.where(mask.unsqueeze(1), x, torch.nan)
        found.append((x, make(shape, dtype), make(shape, dtype) if options.get("residual") else None, mask))
    return found


def layer_of(case, **more):
    chosen = ("affine", "momentum", "track_running_stats", "activation", "dtype")
    options = {name: CASES[case][name] for name in chosen if name in CASES[case]}
    layer = bn.SyncBatchNorm(C, **options, **more)
    if layer.affine:
        with torch.no_grad():
            layer.weight.copy_(torch.linspace(0.5, 2.0, C))
            layer.bias.copy_(torch.linspace(-1.0, 1.0, C))
    return layer


def steps_of_each_case(rank, world):
    """Two steps of every case; y, gradients and buffers of the second, and how many collectives it took."""
    found = {}
    for case in CASES:
        layer, counted = layer_of(case), {}
        for _ in range(2):
            x, dy, residual, mask = parts(case, world)[rank]
            x.requires_grad_()
            for vector in layer.parameters():
                vector.grad = None
            with ranks.counting(counted := {}), torch.autocast("cpu", enabled="autocast" in case):
                y = layer(x, residual, mask)
                forward = dict(counted)
                y.backward(dy)
        gradients = [x.grad, *(vector.grad for vector in layer.parameters())]
        found[case] = (y.detach(), gradients, dict(layer.named_buffers()), forward, counted, layer.measured)
    return found


@pytest.fixture(scope="module", params=[2, 3, 4])
def each_case(request):
    return request.param, ranks.run(steps_of_each_case, request.param, request.param)


# torch's operators, unlike ours, keep the mean in float32, with an ulp of 1e-3 at 1e4.
EXACT = [pytest.param(case, marks=pytest.mark.kernels if case == "far_mean" else ()) for case in CASES]


@pytest.mark.parametrize("case", EXACT)
def test_equals_one_process_on_the_whole_batch(each_case, case):
    world, by_rank = each_case
    layer, inputs = layer_of(case), parts(case, world)
    whole = [None if field[0] is None else torch.cat(field) for field in zip(*inputs, strict=True)]
    x, dy, residual, mask = whole
    vectors = (layer.weight, layer.bias) if layer.affine else (None, None)
    options = {"residual": residual, "activation": activations.parse(layer.activation), "mask": mask}
    exact = reference.forward(x, *vectors, layer.eps, **options)
    gradients = reference.backward(dy, x, *vectors, layer.eps, **options)
    y = torch.cat([found[case][0] for found in by_rank])
    # An ulp of bfloat16 is 2^-8; what is measured is float64 and arithmetic float32, so rounding y is all there is. The
    # mean of 1e4 is exact too: what is left of x - mean has an ulp of x in float32, 1e-3, which is in the input itself.
    assert_close(y, exact.y)
    ours = [found[case][1] for found in by_rank]
    assert_close(torch.cat([dx for dx, *_ in ours]), gradients.dx)
    if layer.affine:  # what data parallelism sums or averages
        for index, name in ((1, "dweight"), (2, "dbias")):
            total, expected = sum(g[index].double() for g in ours), getattr(gradients, name)
            assert_close(total.to(layer.weight.dtype), expected, scale=float(dy.double().abs().sum()), ulps=1)
    if layer.track_running_stats:
        moments = Moments.measure(x, mask)
        momenta = (1.0, 0.5) if layer.momentum is None else (0.1, 0.1)
        for name, start, now in (("running_mean", 0.0, moments.mean), ("running_var", 1.0, moments.variance(True))):
            running = torch.full((C,), start, dtype=torch.float64)
            for momentum in momenta:
                running = running + momentum * (now - running)
            assert_close(by_rank[0][case][2][name], running)


@pytest.mark.parametrize("case", CASES)
def test_ranks_agree_to_the_bit(each_case, case):
    _, (first, *others) = each_case
    for other in others:
        for name, buffer in first[case][2].items():
            assert torch.equal(buffer, other[case][2][name])
        assert torch.equal(first[case][5].mean, other[case][5].mean)
        assert torch.equal(first[case][5].m2, other[case][5].m2)
        assert torch.equal(first[case][5].count, other[case][5].count)


@pytest.mark.parametrize("case", CASES)
def test_one_collective_forward_and_one_backward(each_case, case):
    for found in each_case[1]:
        forward, both = found[case][3:5]
        assert sum(forward.values()) == 1
        assert sum(both.values()) == 2
        assert both["all_reduce"] == 1
