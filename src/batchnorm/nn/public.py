"""What our own classes have under public names: options as arguments and attributes, gamma, beta, measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from .. import activations
from ..activations import Activation
from ..moments import Moments
from ..pipeline import Nonfinite
from .layer import BatchNormLayer, keep_statistics_precise, skipped_by
from .options import (
    ALL,
    Initializer,
    Options,
    beyond_torch,
    check_initializers,
    check_options,
    momentum_of,
)
from .renorm import Renorm

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class OptionsByName(BatchNormLayer):
    """A layer of ours, with its options as attributes."""

    activation: Activation
    virtual_batch_size: int | None
    renorm: Renorm | None
    sync: bool
    process_group: ProcessGroup | None
    nonfinite: Nonfinite
    singleton: Literal["raise", "running"]
    channel_dim: int
    unbiased: bool
    initializers: Mapping[str, Initializer]

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: str | nn.Module | type[nn.Module] | None = None,
        virtual_batch_size: int | None = None,
        renorm: Renorm | None = None,
        sync: bool = False,
        process_group: ProcessGroup | None = None,
        nonfinite: Nonfinite = "propagate",
        singleton: Literal["raise", "running"] = "raise",
        channel_dim: int = 1,
        center: bool = True,
        scale: bool = True,
        decay: float | None = None,
        unbiased: bool = True,
        initializers: Mapping[str, Initializer] | None = None,
    ) -> None:
        """A new layer; the class's own text says what the arguments mean."""
        options = Options(
            activation=activations.parse(activation),
            virtual_batch_size=virtual_batch_size,
            renorm=renorm,
            sync=sync,
            nonfinite=nonfinite,
            singleton=singleton,
            channel_dim=channel_dim,
            unbiased=unbiased,
            process_group=process_group,
            initializers=check_initializers(initializers or {}),
        )
        options = check_options(options, track_running_stats)
        momentum = momentum_of(momentum, decay)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        if not scale:
            self.weight = None
        if not (bias and center):  # torch 2.10 does not take it
            self.bias = None
        self.__dict__["_batchnorm_options"] = options
        keep_statistics_precise(self, {})
        if initializers:
            self.reset_parameters()

    @property
    def gamma(self) -> Tensor | None:
        """The learned scale, (C,): another name of `weight`."""
        return self.weight

    @property
    def beta(self) -> Tensor | None:
        """The learned shift, (C,): another name of `bias`."""
        return self.bias

    @property
    def beyond_torch(self) -> dict[str, Any]:
        """The options in use that torch.nn's layer does not have."""
        return beyond_torch(self)

    @property
    def measured(self) -> Moments | None:
        """Moments of the last batch seen in train mode, eager and outside torch.func's transforms; None before it."""
        return self._batchnorm_moments

    @property
    def skipped(self) -> int:
        """How many batches had a channel that nonfinite="skip" kept out of the running statistics. Waits for a GPU."""
        return skipped_by(self)

    def __setattr__(self, name: str, value: Any) -> None:
        # Module's own would register the module of an activation.
        if name in _OPTIONS:
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)


_OPTIONS = dict.fromkeys(ALL)  # keys of a dict: every assignment to a layer looks here


def _option(name: str) -> property:
    def get(self: BatchNormLayer) -> Any:
        return getattr(self._batchnorm_options, name)

    def set(self: BatchNormLayer, value: Any) -> None:
        # An option set later is held to what the constructor asks.
        changed = replace(self._batchnorm_options, **{name: value})
        self.__dict__["_batchnorm_options"] = check_options(changed, self.running_mean is not None)

    return property(get, set, doc="As the constructor's argument of this name.")


for _name in ALL:
    setattr(OptionsByName, _name, _option(_name))
