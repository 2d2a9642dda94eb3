"""One step of a layer, forward and backward, beside the float64 oracle's, whatever its options are."""

from __future__ import annotations

from itertools import pairwise

import torch
from compare import assert_close
from torch import Tensor

from batchnorm import Moments, reference
from batchnorm.moments import per_channel
from batchnorm.nn.layer import BatchNormLayer


def cut(items: int, size: int | None, space: int) -> list[slice]:
    """Virtual batches: `size` items each, the last one of the rest; a rest of one value joins the one before it."""
    firsts = list(range(0, items, size or max(items, 1)))
    if len(firsts) > 1 and (items - firsts[-1]) * space == 1 and size != 1:
        firsts.pop()
    return [slice(*ends) for ends in pairwise([*firsts, items])]


def randomize(layer: BatchNormLayer) -> BatchNormLayer:
    """Parameters and running statistics away from their defaults."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(0.5, 1.5)
        for name in ("running_mean", "running_var"):
            if getattr(layer, name) is not None:
                getattr(layer, name).uniform_(0.5, 1.5)
    return layer


def oracle(
    layer: BatchNormLayer, x: Tensor, dy: Tensor, mask: Tensor | None, residual: Tensor | None
) -> dict[str, Tensor]:
    """y, gradients and running statistics of one step, float64; channels where the layer has them."""
    dim = layer.channel_dim
    x, dy, added = (None if t is None else t.detach().double().movedim(dim, 1) for t in (x, dy, residual))
    mask = None if mask is None else mask.expand(x.select(1, 0).shape)
    vectors = [None if t is None else t.detach().double() for t in (layer.weight, layer.bias)]
    measures = layer.training or layer.running_mean is None
    given = None if measures else (layer.running_mean, layer.running_var)
    outputs, gradients, factors = [], [], []
    for part in cut(x.size(0), layer.virtual_batch_size if measures else None, x[0, 0].numel()):
        options = {"running": given, "activation": layer.activation}
        options |= {"mask": None if mask is None else mask[part], "residual": None if added is None else added[part]}
        y, _, var = reference.forward(x[part], *vectors, layer.eps, **options)
        outputs.append(y)
        factor = torch.rsqrt(var + layer.eps) * (1.0 if layer.weight is None else vectors[0])
        factors.append(factor.view(per_channel(x)).expand_as(y))
        gradients.append(reference.backward(dy[part], x[part], *vectors, layer.eps, **options))
    each = [torch.stack(g) if g[0].dim() == 1 else torch.cat(g).movedim(1, dim) for g in zip(*gradients, strict=True)]
    expected = {"y": torch.cat(outputs).movedim(1, dim), "x": each[0], "residual": each[3]}
    expected |= {"weight": each[1].sum(0), "bias": each[2].sum(0), "factor": torch.cat(factors).movedim(1, dim)}
    for name in ("running_mean", "running_var") if layer.running_mean is not None else ():
        expected[name] = getattr(layer, name).double()
    if layer.training and layer.track_running_stats:
        moments, momentum = Moments.measure(x, mask), layer.momentum
        for name, measured in (("running_mean", moments.mean), ("running_var", moments.variance(layer.unbiased))):
            if moments.count > (name == "running_var" and layer.unbiased):
                expected[name] = (1 - momentum) * expected[name] + momentum * measured
    return expected


def assert_step(
    layer: BatchNormLayer,
    x: Tensor,
    dy: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    residual: Tensor | None = None,
    **how: Tensor,
) -> Tensor:
    """Assert that the layer's step on x is the oracle's; returns y.

    Bounds are those of `assert_close`: some roundings of the result; for sums over the batch, of what was added up; for
    the gradient of x, of gamma / sigma, for it is that times a difference.

    Args:
        layer: changed as the step changes it; its gradients are cleared before.
        dy: gradient of y, random where None.
        mask: what the oracle masks; passed to the layer too, unless `how` has lengths instead.
    """
    dy = torch.randn_like(x) if dy is None else dy
    expected = oracle(layer, x, dy, mask, residual)
    layer.zero_grad()
    leaves = {"x": x.detach().requires_grad_()}
    if residual is not None:
        leaves["residual"] = residual.detach().requires_grad_()
    y = layer(leaves["x"], leaves.get("residual"), **(how or {"mask": mask}))
    y.backward(dy)
    assert y.dtype == x.dtype
    assert_close(y, expected["y"])
    size = expected["factor"].clamp(min=1.0)
    assert_close((leaves["x"].grad / size).to(x.dtype), expected["x"] / size)
    if residual is not None:
        assert_close(leaves["residual"].grad, expected["residual"])
    terms = max(1.0, dy.double().abs().sum().item())
    for name, parameter in layer.named_parameters():
        assert_close(parameter.grad, expected[name], scale=terms)
    for name in ("running_mean", "running_var"):
        if name in expected:
            assert_close(getattr(layer, name), expected[name])
    return y
