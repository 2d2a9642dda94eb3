"""One training step of a model, and how far one step is from another."""

from __future__ import annotations

import copy
import math
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from .pairs import is_norm

Step = dict[str, Tensor]

# In float64 both sides round at 1e-16; the deepest networks amplify that by some 1e5, so 1e-8 leaves a factor of a
# thousand, and a wrong formula is off by 1e-3 and more. Few amplify it more: there ours may be eight times as far off
# as torch's own step with an input that differs by four roundings, for each layer of ours rounds anew.
WIDE, SHAKEN = 1e-8, 1 + 2**-50
# In float32 both round, each in its own way, so errors against float64 are of one size and not the same: ours may be
# twice torch's, and 32 roundings of 6e-8 more. At the kink of a ReLU rounding decides which side a value is on, and one
# value on the other side changes gradients by 1e-2: on some inputs torch's, on others ours. So INPUTS are tried, and
# each part of a step must be within the bound on one of them at least.
TIMES, LEAST, INPUTS = 2.0, 2e-6, 5


def call(model: nn.Module, x: Any) -> list[Tensor]:
    """The floating-point tensors that the model returns; a mapping is given by keyword."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(next(p.dtype for p in model.parameters()))  # of what a forward makes anew
    try:
        value = model(**x) if isinstance(x, dict) else model(x)
    finally:
        torch.set_default_dtype(usual)
    value = dict(value) if hasattr(value, "items") else value
    leaves = _pytree.tree_leaves(value)
    return [t for t in leaves if isinstance(t, Tensor) and t.is_floating_point()]


def widened(x: Any) -> Any:
    """The same input in float64."""
    return _pytree.tree_map(lambda t: t.double() if t.is_floating_point() else t, x)


def another(x: Any, seed: int) -> Any:
    """An input of the same shapes."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda t: torch.randn(t.shape, generator=generator) if t.is_floating_point() else t  # noqa: E731
    return _pytree.tree_map(draw, x)


def step(model: nn.Module, x: Any) -> Step:
    """Outputs, gradients, running statistics and counters of a training step: the backward of a fixed sum."""
    model.train()
    torch.manual_seed(0)
    outputs = call(model, x)
    generator = torch.Generator().manual_seed(2)
    weights = [torch.rand(y.shape, generator=generator, dtype=torch.float64).to(y) for y in outputs]
    loss = sum((y * w).sum() for y, w in zip(outputs, weights, strict=True))
    if isinstance(loss, Tensor) and loss.requires_grad:
        loss.backward()
    found = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    gradients = [p.grad.flatten().double() for p in model.parameters() if p.grad is not None]
    buffers = [b.flatten().double() for n, b in model.named_buffers() if n.endswith(("running_mean", "running_var"))]
    counters = [b.flatten().double() for n, b in model.named_buffers() if n.endswith("num_batches_tracked")]
    parts = {"gradients": gradients, "running statistics": buffers, "counters": counters}
    return found | {name: torch.cat(tensors) for name, tensors in parts.items() if tensors}


def errors(found: Step, exact: Step) -> dict[str, float]:
    """The error of everything in a step over its size, as root of mean squares."""
    if found.keys() != exact.keys():
        return dict.fromkeys(found.keys() | exact.keys(), math.inf)
    return {name: _error(found[name].double(), exact[name].double()) for name in exact}


def _error(found: Tensor, exact: Tensor) -> float:
    if found.shape != exact.shape:
        return math.inf
    error = float((found - exact).norm() / (exact.norm() + 1e-30))
    return error if math.isfinite(error) else math.inf


class Torchs:
    """What torch's layers compute in a step, in both dtypes, on as many inputs as are asked for; each once."""

    def __init__(self, model: nn.Module, x: Any) -> None:
        self.model, self.wide = model, copy.deepcopy(model).double()
        self._x = x
        self.exact, self.narrow, self.amplified = cache(self._exact), cache(self._narrow), cache(self._amplified)

    def x(self, k: int) -> Any:
        """The given input, and others of its shapes."""
        return another(self._x, k) if k else self._x

    def _exact(self, k: int) -> Step:
        return step(copy.deepcopy(self.wide), widened(self.x(k)))

    def _amplified(self) -> dict[str, float]:
        shaken = _pytree.tree_map(lambda t: t * SHAKEN if t.is_floating_point() else t, widened(self.x(0)))
        return errors(step(copy.deepcopy(self.wide), shaken), self.exact(0))

    def _narrow(self, k: int) -> Step:
        return step(copy.deepcopy(self.model), self.x(k))


def too_far(ours: nn.Module, torchs: Torchs) -> str:
    """What of a step in float32 is farther from the exact one than it may be, on every input; empty if nothing is."""
    far: dict[str, str] = {}
    for k in range(INPUTS):
        exact = torchs.exact(k)
        own, theirs = errors(step(copy.deepcopy(ours), torchs.x(k)), exact), errors(torchs.narrow(k), exact)
        now = {n: f"{n} {own[n]:.1g}, torch's {theirs[n]:.1g}" for n in own if own[n] > TIMES * theirs[n] + LEAST}
        far = {n: text for n, text in now.items() if not k or n in far}
        if not far:
            break
    return ", ".join(far.values())


def take_out_chance(model: nn.Module) -> None:
    """Models that draw random numbers in another order are not to be compared."""
    for module in model.modules():
        for name in ("p", "drop_prob", "drop_rate", "attn_dropout", "dropout", "attention_dropout", "layerdrop"):
            if isinstance(vars(module).get(name), float):
                setattr(module, name, 0.0)


def train_a_little(model: nn.Module) -> None:
    """Parameters and running statistics unlike a new layer's, whose gamma is 1 and beta 0."""
    generator = torch.Generator().manual_seed(1)
    ranges = {"weight": (0.5, 1.5), "bias": (-0.3, 0.3), "running_mean": (-0.3, 0.3), "running_var": (0.5, 1.5)}
    for module in filter(is_norm, model.modules()):
        for name, (low, high) in ranges.items():
            tensor = getattr(module, name, None)
            if tensor is not None:
                tensor.data.uniform_(low, high, generator=generator)
