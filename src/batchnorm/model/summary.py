"""summary(): a table of the batch norms of a model: what each is, what it learns, and whether it is converted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from ..checks import check_model
from ..fuse import fused_in
from ..nn.layer import BatchNormLayer as Ours
from ..table import Table
from .adapters.adapter import is_lazy
from .find import Found, bare, clean, require


@dataclass(frozen=True)
class Row:
    """One batch norm; None for what is not known, for example in a checkpoint.

    Attributes:
        name: its name in the model; empty for the model itself.
        kind: its class.
        channels: C; None before a lazy layer's first input.
        momentum: None for a cumulative average too.
        eps: in units of x squared.
        learns: "gamma, beta", one of them, or "nothing"; what is frozen is named after "frozen".
        batches: how many the running statistics have tracked.
        ours: whether it is a layer of ours, converted or built.
        fused: what runs with it in one operation, as "relu" or "add + relu".
        why_not: for a layer that is not ours, why `convert` does not convert it; empty if it would.
    """

    name: str
    kind: str | None
    channels: int | None
    momentum: float | None
    eps: float | None
    learns: str
    batches: int | None
    ours: bool | None = None
    fused: str = ""
    why_not: str = ""


@dataclass(frozen=True)
class Summary(Table):
    """The batch norms of a model, in model order; shown as a table, printed or in a notebook."""

    _columns = ("layer", "class", "channels", "momentum", "eps", "learns", "batches", "ours")
    _numbers = ("channels", "momentum", "eps", "batches")

    rows: list[Row]

    def to_dict(self) -> dict[str, Any]:
        """What JSON can write."""
        return {"batch_norms": [asdict(row) for row in self.rows]}

    @property
    def headline(self) -> str:
        """The table in one sentence."""
        many = f"{len(self.rows)} batch norm{'s' * (len(self.rows) != 1)}"
        if any(row.ours is None for row in self.rows):
            return f"{many}, {sum(row.channels or 0 for row in self.rows):,} channels"
        ours = [row for row in self.rows if row.ours]
        said = f"{many}: {len(ours)} ours ({sum(bool(row.fused) for row in ours)} fused with what follows)"
        groups = Counter((row.kind, row.why_not or "not converted yet") for row in self.rows if not row.ours)
        return said + "".join(f"; {count} {kind}: {why}" for (kind, why), count in groups.items())

    def _cells(self) -> Iterable[tuple[str, ...]]:
        for row in self.rows:
            numbers = [
                "-" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:g}"
                for value in (row.channels, row.momentum, row.eps)
            ]
            ours = "" if row.ours is None else ("yes" if row.ours else f"no: {row.why_not}" if row.why_not else "no")
            batches = "-" if row.batches is None else f"{row.batches:,}"
            followed = f"{ours}, with {row.fused}" if row.fused else ours
            yield (row.name or "(the model)", row.kind or "-", *numbers, row.learns, batches, followed)


def summary(model: nn.Module) -> Summary:
    """Return a table of all batch norms of a model, for the terminal and the notebook.

    Args:
        model: any module, or a batch-norm layer itself; compiled or wrapped too.

    Returns:
        A `Summary`, with a `Row` a layer.

    Raises:
        ValueError: the model has no batch norm; the message names what it has.
        TypeError: not a module.

    Example:
        >>> model = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
        >>> print(bn.summary(bn.convert(model, fuse=True)))
        2 batch norms: 2 ours (1 fused with what follows)
        layer  class        channels  momentum    eps  learns       batches  ours
        0      BatchNorm2d         8       0.1  1e-05  gamma, beta        0  yes, with relu
        3      BatchNorm2d         8       0.1  1e-05  gamma, beta        0  yes
    """
    check_model(model)
    found = require(model, "sum up")
    fused = _fused(bare(model), [each.name for each in found])
    return Summary([_row(each, fused) for each in found])


def _row(found: Found, fused: dict[str, str]) -> Row:
    layer, adapter = found.layer, found.adapter
    ours = isinstance(layer, Ours)
    counter = adapter.batches(layer)
    lazy = is_lazy(layer)
    after = [type(module).__name__.lower() for module in adapter.after(layer)] if ours else []
    return Row(
        name=found.name,
        kind=found.kind,
        channels=None if lazy else adapter.channels(layer),
        momentum=adapter.momentum(layer),
        eps=adapter.eps(layer),
        learns=_learns(found),
        batches=None if counter is None or lazy else int(counter),
        ours=ours,
        fused=fused.get(found.name, " + ".join(after)),
        why_not="" if ours else adapter.kept(layer) or "",
    )


def _learns(found: Found) -> str:
    """Which of gamma and beta the layer has, and which of them is frozen."""
    layer = found.layer
    if not found.adapter.learns:
        return "nothing, frozen"
    has = [(said, getattr(layer, name)) for said, name in (("gamma", "weight"), ("beta", "bias"))]
    said = [name for name, tensor in has if tensor is not None and tensor.requires_grad] or ["nothing"]
    frozen = [
        f"{name} (a buffer)" if tensor is layer._buffers.get(attribute) else name
        for (name, tensor), attribute in zip(has, ("weight", "bias"), strict=True)
        if tensor is not None and not tensor.requires_grad
    ]
    frozen += ["statistics"] * ("stats" in getattr(layer, "frozen", ()))
    return ", ".join(said) + (f"; frozen: {', '.join(frozen)}" if frozen else "")


def _fused(model: nn.Module, names: list[str]) -> dict[str, str]:
    """What runs with each batch norm in one operation, by the layer's name."""
    fused, modules = {}, dict(model.named_modules())
    for name, operations in fused_in(model).items():
        prefix = f"{name}." if name else ""
        for layer, added, last in operations:
            activation = modules.get(prefix + last)
            said = "add + " * added + (last if activation is None else type(activation).__name__.lower())
            path = clean(prefix + layer.removesuffix("[]"))
            within = [n for n in names if n.startswith(f"{path}.")]
            # a name may stand for a list of layers, or for a child that ends in one
            layers = [path] if path in names else within if layer.endswith("[]") else within[-1:]
            fused.update(dict.fromkeys(layers, said))
    return fused
