"""One case of batch normalization: its tensors, the operation by us and by torch, and ours compared with float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..activations import parse
from ..functional import batch_norm

LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
ACTIVATIONS = {"BN": None, "BN+ReLU": "relu", "BN+ReLU6": "relu6", "BN+add+ReLU": "relu"}
KINKS = {None: (), "relu": (0.0,), "relu6": (0.0, 6.0)}
CHECKED_VALUES = 1 << 20


@dataclass(frozen=True)
class Case:
    """One thing that is timed."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    last: bool
    variant: str
    mode: str

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def traffic(self, resident: bool) -> int:
        """Unavoidable memory traffic, in T; `resident`: the second reading of a value comes from cache."""
        residual = self.variant == "BN+add+ReLU"
        if self.mode == "eval":
            return 2 + residual
        forward = (2 if resident else 3) + residual
        backward = (3 if resident else 5) + 2 * residual
        return forward + (backward if self.mode == "forward+backward" else 0)

    @property
    def floor(self) -> float:
        """Traffic that cannot be avoided on a CPU, in copies (2 T each)."""
        return self.traffic(resident=not self.last and len(self.shape) > 2) / 2

    @property
    def words(self) -> tuple[str, str, str, str, str]:
        """Shape, dtype, layout, what and mode, for a table."""
        layout = "last" if self.last else "first"
        return "x".join(map(str, self.shape)), str(self.dtype)[6:], layout, self.variant, self.mode


class WrongResult(ValueError):
    """What is not worth timing: a result that is further from float64 than rounding takes it."""


class Problem:
    """The tensors of a case, and the operation on them by either side."""

    def __init__(self, case: Case, device: torch.device | str = "cpu") -> None:
        self.case = case
        self.differentiated = case.mode == "forward+backward"
        self.training = case.mode != "eval"
        self.activation = ACTIVATIONS[case.variant]
        values = torch.randn(case.shape, device=device).to(case.dtype)
        self.x = values.contiguous(memory_format=LAST[len(case.shape)]) if case.last else values
        self.residual = torch.randn_like(self.x) if case.variant == "BN+add+ReLU" else None
        channels = case.shape[1]
        self.weight, self.bias = torch.rand(channels, device=device), torch.randn(channels, device=device)
        self.running = torch.zeros(channels, device=device), torch.ones(channels, device=device)
        self.dy = torch.randn_like(self.x)
        self.leaves = [t for t in (self.x, self.weight, self.bias, self.residual) if t is not None]
        for leaf in self.leaves:
            leaf.requires_grad_(self.differentiated)

    def ours(self) -> Tensor:
        options = {"residual": self.residual, "activation": self.activation}
        return batch_norm(self.x, *self.running, self.weight, self.bias, self.training, **options)

    def torchs(self) -> Tensor:
        return self.finish(F.batch_norm(self.x, *self.running, self.weight, self.bias, self.training))

    def finish(self, y: Tensor) -> Tensor:
        """What comes after torch's batch norm, by torch."""
        if self.residual is not None:
            y = y + self.residual
        return y if self.activation is None else getattr(F, self.activation)(y)

    def step(self, forward: Callable[[], Tensor]) -> Callable[[], object]:
        """What is timed: the forward pass, with the gradients of everything if the case asks for them."""
        if self.differentiated:
            return lambda: torch.autograd.grad(forward(), self.leaves, self.dy)
        return forward

    def check(self, values: int | None = None) -> None:
        """Compare ours with float64: y and every gradient, on as many channels as have so many values.

        Raises:
            WrongResult: where they differ by more than rounding does.
        """
        channels = self.case.shape[1]
        many = max(1, min(channels, (values or CHECKED_VALUES) * channels // self.x.numel()))
        picked = torch.linspace(0, channels - 1, many, device=self.x.device).long()
        x, dy = (t.detach().index_select(1, picked) for t in (self.x, self.dy))
        weight, bias = self.weight.detach()[picked], self.bias.detach()[picked]
        residual = None if self.residual is None else self.residual.detach().index_select(1, picked)
        options = {
            "running": None if self.training else (self.running[0][picked], self.running[1][picked]),
            "residual": residual,
        }
        activation = parse(self.activation)
        exact = reference.forward(x, weight, bias, activation=activation, **options).y
        y = self.ours()
        # y takes some 5 roundings of numbers no larger than the largest |y|, and one more to its own dtype.
        eps, fine = torch.finfo(x.dtype).eps, torch.finfo(torch.float32).eps
        self._compare("y", y.detach().index_select(1, picked), exact, 8 * eps * exact.abs().max())
        if not self.differentiated:
            return
        # Beside a kink rounding decides what the derivative is: no gradient comes from there. Where torch's operators
        # serve, z is rounded to its dtype before the kink, and with a residual before and after the addition.
        z = reference.forward(x, weight, bias, **options).y
        for kink in KINKS[self.activation]:
            dy = torch.where((z - kink).abs() > max(1e-3, 8 * eps), dy, 0.0)
        found = torch.autograd.grad(y, self.leaves, self.dy.index_copy(1, picked, dy))
        grads = reference.backward(dy, x, weight, bias, activation=activation, **options)
        # A channel's sums carry the rounding of each of their terms, which are no larger than |dy| * |xhat|.
        over = [d for d in range(x.dim()) if d != 1]
        terms = 16 * fine * dy.double().abs().sum(over) * max(1.0, exact.abs().max())
        largest = dy.double().abs().max()
        bounds = (16 * eps * largest, terms, terms, 16 * eps * largest)
        names = ("dx", "dweight", "dbias", "dresidual")
        for name, ours, true, bound in zip(names, found, grads, bounds, strict=False):
            self._compare(name, ours.index_select(min(ours.dim() - 1, 1), picked), true, bound)

    def _compare(self, name: str, ours: Tensor, exact: Tensor, bound: Tensor) -> None:
        error, bound = torch.broadcast_tensors((ours.double() - exact).abs(), bound)
        if not (error <= bound).all():
            what, worst = " ".join(self.case.words), (error / bound).argmax()
            error, bound = error.flatten()[worst], bound.flatten()[worst]
            raise WrongResult(f"{what}: {name} is off by {error:.2g} from float64, over the bound of {bound:.2g}")
