"""The options of a layer: what they may be, and which exclude each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypedDict

from torch import Tensor, nn

from .. import activations
from ..activations import Activation
from ..checks import check_virtual_batch_size
from ..pipeline import Nonfinite
from .renorm import Renorm

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Initializer = float | Callable[[Tensor], Any]


@dataclass(frozen=True)
class Options:
    """What our layers have beyond torch.nn's, in the order of repr.

    A layer keeps them in one attribute, under a name that no other class uses: a subclass that is converted may have an
    `activation` or a `gamma` of its own.
    """

    activation: Activation = activations.NONE
    virtual_batch_size: int | None = None
    renorm: Renorm | None = None
    sync: bool = False
    nonfinite: Nonfinite = "propagate"
    singleton: Literal["raise", "running"] = "raise"
    channel_dim: int = 1
    unbiased: bool = True
    process_group: ProcessGroup | None = None
    initializers: Mapping[str, Initializer] = field(default_factory=dict)

    usual: ClassVar[bool]  # of each instance, but no field: see Activation
    """Whether a call on one rank, of a layer with these, may be one operator: decided once, not per call."""

    def __post_init__(self) -> None:
        usual = (self.virtual_batch_size, self.renorm, self.channel_dim) == (None, None, 1)
        object.__setattr__(self, "usual", usual and self.nonfinite != "raise")


ALL = tuple(each.name for each in fields(Options))
SHOWN = tuple(name for name in ALL if name not in ("process_group", "initializers"))


class SharedOptions(TypedDict, total=False):
    """The options that may be set on all layers of a model at once."""

    virtual_batch_size: int | None
    renorm: Renorm | None
    nonfinite: Nonfinite
    singleton: Literal["raise", "running"]
    unbiased: bool


def options_of(layer: nn.Module | type[nn.Module]) -> Options:
    """The options of a layer of ours, or those that a class has where nothing is given."""
    return layer._batchnorm_options  # pyright: ignore[reportReturnType, reportAttributeAccessIssue]


def beyond_torch(layer: nn.Module, built: bool = False) -> dict[str, Any]:
    """The options in use that torch.nn's layer does not have; `built`: but for what `set_options` has done."""
    options, default = options_of(layer), options_of(type(layer))
    if built:
        options = replace(options, **layer.__dict__.get("_batchnorm_before", {}))
    return {name: getattr(options, name) for name in SHOWN if getattr(options, name) != getattr(default, name)}


def put_options(layer: nn.Module, **options: Any) -> None:
    """Give the layer these options, which were checked before."""
    layer.__dict__["_batchnorm_options"] = replace(options_of(layer), **options)


def set_options(layer: nn.Module, options: Mapping[str, Any]) -> None:
    """Give the layer options that were checked before, so that `restore_options` can undo it."""
    before = layer.__dict__.setdefault("_batchnorm_before", {})
    for name in options:
        before.setdefault(name, getattr(options_of(layer), name))
    put_options(layer, **options)


def restore_options(layer: nn.Module) -> None:
    """Undo `set_options`."""
    before = layer.__dict__.pop("_batchnorm_before", None)
    if before is not None:
        put_options(layer, **before)


def check_options(given: Options, tracks: bool) -> Options:
    """The options, the activation parsed; raises a ValueError where they do not exist or contradict each other."""
    options = {name: getattr(given, name) for name in ALL}
    for name, known in (("nonfinite", ("propagate", "skip", "raise")), ("singleton", ("raise", "running"))):
        if options[name] not in known:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, but got {options[name]!r}")
    check_virtual_batch_size(options["virtual_batch_size"])
    if options["renorm"] is not None and not isinstance(options["renorm"], Renorm):
        raise ValueError(
            f"renorm must be a Renorm, as in renorm=Renorm(r_max=3, d_max=5), but got {options['renorm']!r}"
        )
    if options["virtual_batch_size"] and (options["sync"] or options["renorm"]):
        other = "sync" if options["sync"] else "renorm"
        raise ValueError(
            f"virtual_batch_size excludes {other}, because a virtual batch is measured by itself: drop one"
        )
    if not isinstance(options["channel_dim"], int) or options["channel_dim"] == 0:
        raise ValueError(
            "channel_dim must be an integer, and not be 0, the dimension of the batch: 1, or -1 for channels last; "
            f"got {options['channel_dim']!r}"
        )
    needs = {"renorm": options["renorm"] is not None, 'singleton="running"': options["singleton"] == "running"}
    needs[f"nonfinite={options['nonfinite']!r}"] = options["nonfinite"] != "propagate"
    for name, needed in needs.items():
        if needed and not tracks:
            raise ValueError(f"{name} needs running statistics: build the layer with track_running_stats=True")
    return replace(given, activation=activations.parse(given.activation))


def check_initializers(initializers: Mapping[str, Initializer]) -> dict[str, Initializer]:
    """The initializers; raises a ValueError where one is of nothing, or is nothing that fills a tensor."""
    unknown = set(initializers) - {"weight", "bias", "running_mean", "running_var"}
    if unknown:
        raise ValueError(
            f"initializers must be for weight, bias, running_mean or running_var; got {', '.join(sorted(unknown))}"
        )
    for name, value in initializers.items():
        if not (callable(value) or isinstance(value, (int, float))):
            raise ValueError(
                f"the initializer of {name} must be a number, or a function that fills the tensor it is given, such as "
                f"torch.nn.init.zeros_; got {value!r}"
            )
    return dict(initializers)


def momentum_of(momentum: float | None, decay: float | None) -> float | None:
    """The momentum that a layer built with these has; raises a ValueError where both are given."""
    if decay is None:
        return momentum
    if not (momentum == 0.1 and 0 <= decay <= 1):
        raise ValueError(
            f"decay must be from 0 to 1, and replaces momentum: give one; got decay={decay}, momentum={momentum}"
        )
    return round(1.0 - decay, 12)  # 0.01 of 0.99, as it was meant
