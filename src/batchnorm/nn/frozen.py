"""Frozen: what is mixed into the class of a batch-norm layer for as long as it is frozen."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..mixin import Mixin, mix_in, take_out
from .replaced import Irreplaceable


class Frozen(Mixin, Irreplaceable):
    """A layer that is in eval mode whatever train() says, and shows what of it is frozen."""

    _frozen_stats: bool = False
    _frozen_affine: tuple[str, ...] | None = None  # names of the parameters whose requires_grad was turned off

    @property
    def training(self) -> bool:
        """False while the statistics are frozen. train(), eval() and assignments set what it is again afterwards."""
        return not self._frozen_stats and self.__dict__["training"]

    @training.setter
    def training(self, mode: bool) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        self.__dict__["training"] = mode

    @property
    def frozen(self) -> list[str]:
        """What is frozen: "stats", "affine", or both."""
        return ["stats"] * self._frozen_stats + ["affine"] * (self._frozen_affine is not None)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, frozen={'+'.join(self.frozen)}"

    def reset_running_stats(self) -> None:
        """Nothing while the statistics are frozen: torch.optim.swa_utils.update_bn resets every layer it finds."""
        if not self._frozen_stats:
            super().reset_running_stats()  # pyright: ignore[reportAttributeAccessIssue]

    def reset_parameters(self) -> None:
        """Set everything as in a new layer, frozen or not: so a lazy layer is filled at its first input."""
        frozen, self._frozen_stats = self._frozen_stats, False
        try:
            super().reset_parameters()  # pyright: ignore[reportAttributeAccessIssue]
        finally:
            self._frozen_stats = frozen

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # Where torch keeps the version of each module: it neither requires nor rejects other entries there.
        if hasattr(destination, "_metadata"):
            destination._metadata[prefix[:-1]]["frozen"] = self.frozen

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, *rest: Any, **named: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest, **named)
        freeze_as_saved(self, local_metadata)


def freeze_layer(layer: nn.Module, stats: bool, affine: bool) -> None:
    """Freeze the one layer, beyond what is frozen already."""
    mix_in(layer, Frozen)
    assert isinstance(layer, Frozen)
    layer._frozen_stats = layer._frozen_stats or stats
    if affine and layer._frozen_affine is None:
        learned = {name: p for name, p in layer.named_parameters() if _is_of_the_layer(name) and p.requires_grad}
        for parameter in learned.values():
            parameter.requires_grad = False
        layer._frozen_affine = tuple(learned)


def unfreeze_layer(layer: Frozen) -> None:
    """Undo whatever `freeze_layer` did to it."""
    for name in layer._frozen_affine or ():
        _thaw(layer, name)
    for name in ("_frozen_stats", "_frozen_affine"):
        layer.__dict__.pop(name, None)
    take_out(layer, Frozen)


def _is_of_the_layer(name: str) -> bool:
    """Whether a parameter is the layer's own, or what torch.nn.utils.parametrize computes one from."""
    return "." not in name or name.startswith("parametrizations.")


def _thaw(layer: nn.Module, name: str) -> None:
    """Let what was frozen under this name require a gradient, wherever parametrizations have moved it since."""
    parameters = dict(layer.named_parameters())
    vector = name.split(".")[1] if name.startswith("parametrizations.") else name
    original = f"parametrizations.{vector}.original"
    is_vector = name == vector or name.startswith(original)
    if name in parameters:
        found = [name]
    elif is_vector and vector in parameters:
        found = [vector]
    else:
        found = [other for other in parameters if is_vector and other.startswith(original)]
    for each in found:
        parameters[each].requires_grad = True
    if not found and is_vector and layer._buffers.get(vector) is not None:
        # Of several tensors that require no gradient remove_parametrizations makes no parameter, but a buffer.
        value = layer._buffers.pop(vector)
        layer.register_parameter(vector, nn.Parameter(value.detach()))  # pyright: ignore[reportOptionalMemberAccess]


def freeze_as_saved(layer: nn.Module, metadata: dict[str, Any]) -> None:
    """Freeze the layer as the one was whose state is being loaded; one that was not frozen changes nothing."""
    saved = metadata.get("frozen")
    if isinstance(saved, list) and ("stats" in saved or "affine" in saved):
        freeze_layer(layer, "stats" in saved, "affine" in saved)
