"""The activations that fuse with batch normalization: function, derivative, and the integer code that kernels take."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Elementwise = Callable[[Tensor, float], Tensor]


@dataclass(frozen=True)
class _Kind:
    code: int
    function: Elementwise
    derivative: Elementwise
    # The derivative as a function of the output, where the output determines it: then a layer with a residual can
    # keep its output, which the next layer keeps anyway, instead of the residual.
    from_output: Elementwise | None = None


@dataclass(frozen=True)
class Activation:
    """One activation with its parameter; `slope` is leaky_relu's negative_slope or elu's alpha, else unused."""

    name: str
    slope: float = 0.0
    # Attributes of each instance, but not fields: torch.compile rebuilds a frozen dataclass from all of its fields.
    code: ClassVar[int]
    """The integer code that compiled operators take."""
    output_determines_derivative: ClassVar[bool]
    """True when the derivative can be computed from the output alone."""

    def __str__(self) -> str:
        return self.name if self.slope == _SLOPED.get(self.name, 0.0) else f"{self.name}({self.slope:g})"

    def __post_init__(self) -> None:
        kind = _KINDS[self.name]
        # If the slope is not positive, a negative and a positive input may have the same output.
        by_output = kind.from_output is not None and (self.name not in _SLOPED or self.slope > 0)
        object.__setattr__(self, "code", kind.code)
        object.__setattr__(self, "output_determines_derivative", by_output)

    def __call__(self, z: Tensor) -> Tensor:
        """y = act(z)."""
        return _KINDS[self.name].function(z, self.slope)

    def derivative(self, z: Tensor) -> Tensor:
        """d act / d z, with torch's convention at kinks and at NaN; itself differentiable."""
        return _KINDS[self.name].derivative(z, self.slope)

    def derivative_from_output(self, y: Tensor) -> Tensor:
        """d act / d z as a function of y = act(z); only where `output_determines_derivative`."""
        function = _KINDS[self.name].from_output
        assert function is not None
        return function(y, self.slope)


# Piecewise linear functions use torch's own gradient operators. Their gradient is constant, but autograd still sees a
# function of z, so that the second derivative of beta is 0 and not missing.
_aten = torch.ops.aten


def _relu_derivative(z: Tensor, _: float) -> Tensor:
    return _aten.threshold_backward.default(torch.ones_like(z), z, 0.0)


def _relu6_derivative(z: Tensor, _: float) -> Tensor:
    return _aten.hardtanh_backward.default(torch.ones_like(z), z, 0.0, 6.0)


def _leaky_relu_derivative(z: Tensor, slope: float) -> Tensor:
    return _aten.leaky_relu_backward.default(torch.ones_like(z), z, slope, False)


def _silu_derivative(z: Tensor, _: float) -> Tensor:
    s = torch.sigmoid(z)
    return s * (1 + z * (1 - s))


def _gelu_derivative(z: Tensor, _: float) -> Tensor:
    density = torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    return 0.5 * (1 + torch.erf(z * math.sqrt(0.5))) + z * density


def _gelu_tanh_derivative(z: Tensor, _: float) -> Tensor:
    k, c = math.sqrt(2 / math.pi), 0.044715
    t = torch.tanh(k * (z + c * z**3))
    return 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * k * (1 + 3 * c * z * z)


def _hardswish_derivative(z: Tensor, _: float) -> Tensor:
    return torch.where(z <= -3, 0.0, torch.where(z < 3, z / 3 + 0.5, 1.0))


_KINDS: dict[str, _Kind] = {
    "none": _Kind(0, lambda z, _: z, lambda z, _: torch.ones_like(z), lambda y, _: torch.ones_like(y)),
    "relu": _Kind(1, lambda z, _: F.relu(z), _relu_derivative, _relu_derivative),
    "relu6": _Kind(2, lambda z, _: F.relu6(z), _relu6_derivative, _relu6_derivative),
    "leaky_relu": _Kind(3, F.leaky_relu, _leaky_relu_derivative, _leaky_relu_derivative),
    "elu": _Kind(
        4,
        F.elu,
        # exp of the negative part only: exp of a large z would be inf, and inf * 0 in its gradient NaN.
        lambda z, alpha: torch.where(z <= 0, alpha * torch.exp(z.clamp(max=0)), 1.0),
        lambda y, alpha: torch.where(y <= 0, y + alpha, 1.0),
    ),
    "silu": _Kind(5, lambda z, _: F.silu(z), _silu_derivative),
    "gelu": _Kind(6, lambda z, _: F.gelu(z), _gelu_derivative),
    "gelu_tanh": _Kind(7, lambda z, _: F.gelu(z, approximate="tanh"), _gelu_tanh_derivative),
    "hardswish": _Kind(8, lambda z, _: F.hardswish(z), _hardswish_derivative),
    "sigmoid": _Kind(
        9,
        lambda z, _: torch.sigmoid(z),
        lambda z, _: torch.sigmoid(z) * torch.sigmoid(-z),
        lambda y, _: y * (1 - y),
    ),
    "tanh": _Kind(10, lambda z, _: torch.tanh(z), lambda z, _: 1 - torch.tanh(z).square(), lambda y, _: 1 - y * y),
}
_SLOPED = {"leaky_relu": 0.01, "elu": 1.0}  # with torch's default
NONE = Activation("none")
NAMES = tuple(name for name in _KINDS if name not in ("none", "gelu_tanh"))
_NAMED = {name: Activation(name, _SLOPED.get(name, 0.0)) for name in NAMES}


def parse(activation: str | nn.Module | type[nn.Module] | Activation | None) -> Activation:
    """The Activation for a name, a torch.nn module or its class; None means the identity.

    Args:
        activation: None, one of `NAMES`, or nn.ReLU, ReLU6, LeakyReLU, ELU, SiLU, GELU, Hardswish, Sigmoid, Tanh or
            Identity, as instance or class. A module's own parameters (negative_slope, alpha, approximate) are kept.

    Raises:
        ValueError: an unknown name, or a module of another class.

    Example:
        >>> parse("relu")
        Activation(name='relu', slope=0.0)
        >>> parse(nn.LeakyReLU(0.2))
        Activation(name='leaky_relu', slope=0.2)
    """
    if activation is None:
        return NONE
    if isinstance(activation, Activation):
        return activation
    if isinstance(activation, str) and activation in _NAMED:
        return _NAMED[activation]
    module = activation() if isinstance(activation, type) and activation in MODULES else activation
    found = of_module(module)
    if found is not None:
        return found
    kinds = ", ".join(kind.__name__ for kind in MODULES)
    raise ValueError(
        f"activation must be None, one of {', '.join(NAMES)}, or a torch.nn module of {kinds}; got {activation!r}. "
        "Apply any other activation after the layer."
    )


def of_code(code: int, slope: float = 0.0) -> Activation:
    """The Activation with this integer code."""
    return Activation(next(name for name, kind in _KINDS.items() if kind.code == code), slope)


MODULES: dict[type, Callable[..., Activation]] = {
    nn.Identity: lambda m: NONE,
    nn.ReLU: lambda m: _NAMED["relu"],
    nn.ReLU6: lambda m: _NAMED["relu6"],
    nn.LeakyReLU: lambda m: Activation("leaky_relu", float(m.negative_slope)),
    nn.ELU: lambda m: Activation("elu", float(m.alpha)),
    nn.SiLU: lambda m: _NAMED["silu"],
    nn.GELU: lambda m: Activation("gelu_tanh" if m.approximate == "tanh" else "gelu"),
    nn.Hardswish: lambda m: _NAMED["hardswish"],
    nn.Sigmoid: lambda m: _NAMED["sigmoid"],
    nn.Tanh: lambda m: _NAMED["tanh"],
}


def of_module(module: object) -> Activation | None:
    """The Activation that a module computes; None if it computes anything else.

    Modules of other libraries that only call torch's function are recognized by the name of their class.

    Example:
        >>> of_module(nn.ReLU(inplace=True)), of_module(nn.Softmax())
        (Activation(name='relu', slope=0.0), None)
    """
    kind = type(module)
    make = MODULES.get(kind) or _LOOKALIKES.get(f"{kind.__module__}.{kind.__qualname__}")
    return None if make is None else make(module)


# Source: torch/nn/modules/activation.py, transformers/activations.py, timm/layers/activations.py.
_LOOKALIKES: dict[str, Callable[..., Activation | None]] = {
    "torch.nn.modules.activation.Hardtanh": lambda m: _NAMED["relu6"] if (m.min_val, m.max_val) == (0.0, 6.0) else None,
    "transformers.activations.SiLUActivation": lambda m: _NAMED["silu"],
    "transformers.activations.GELUActivation": lambda m: _NAMED["gelu"] if m.act is F.gelu else None,
    "timm.layers.activations.GELU": lambda m: _NAMED["gelu"],
    "timm.layers.activations.GELUTanh": lambda m: Activation("gelu_tanh"),
    "timm.layers.activations.Sigmoid": lambda m: _NAMED["sigmoid"],
    "timm.layers.activations.Tanh": lambda m: _NAMED["tanh"],
}


def as_module(activation: Activation) -> nn.Module:
    """The torch.nn module that computes the activation; the inverse of `parse`.

    Example:
        >>> as_module(parse("leaky_relu")), as_module(NONE)
        (LeakyReLU(negative_slope=0.01), Identity())
    """
    if activation.name == "gelu_tanh":
        return nn.GELU(approximate="tanh")
    kind = next(kind for kind in MODULES if parse(kind).name == activation.name)
    return kind(activation.slope) if activation.name in _SLOPED else kind()
