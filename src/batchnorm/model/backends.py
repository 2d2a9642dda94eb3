"""backends(): a table of the implementations on this machine, and which of them serves a call."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..activations import NONE
from ..nn.layer import BatchNormLayer as Ours
from ..ops import choose
from ..ops.collective import several
from ..ops.plain import Operands, Settings
from ..table import Table


@dataclass(frozen=True)
class Backend:
    """One implementation.

    Attributes:
        name: cpu, gpu, native or plain; tried in this order.
        serves: the tensors and options that it supports.
        dtypes: as "float32 float64"; "torch's" for those that torch.nn's layer accepts on the device.
        on: whether this machine has it.
        register_bits: width of the registers that its loops use; None if the loops are not ours.
        why_not: why it is off, or does not serve the call that was asked about; else empty.
    """

    name: str
    serves: str
    dtypes: str
    on: bool
    register_bits: int | None
    why_not: str


@dataclass(frozen=True)
class Backends(Table):
    """The implementations, in the order in which they are tried; printed, and in a notebook, a table.

    Attributes:
        rows: one a `Backend`.
        served_by: the name of the implementation that computes the call; None if no call was asked about.
    """

    rows: list[Backend]
    served_by: str | None = None

    _columns = ("backend", "on", "serves", "dtypes", "registers", "why not")

    @property
    def headline(self) -> str:
        """The table in one sentence."""
        on, asked = ", ".join(row.name for row in self.rows if row.on), self.served_by
        return f"torch {torch.__version__}: {on}" + (f"; {asked} serves this call" if asked else "")

    def to_dict(self) -> dict[str, Any]:
        """What JSON can write."""
        return {"served_by": self.served_by, "backends": [asdict(row) for row in self.rows]}

    def _cells(self) -> Iterable[tuple[str, ...]]:
        for row in self.rows:
            bits = "-" if row.register_bits is None else f"{row.register_bits} bits"
            yield row.name, "yes" if row.on else "no", row.serves, row.dtypes, bits, row.why_not


def backends(
    layer: nn.Module | Tensor | None = None,
    x: Tensor | None = None,
    *,
    mask: Tensor | None = None,
) -> Backends:
    """Return which implementation computes batch normalization on this machine, and why the others do not.

    There are four implementations: `cpu`, the compiled operators; `gpu`, Triton kernels, which are off unless a
    committed run has proved them on such a GPU, or BATCHNORM_GPU=1 switches them on; `native`, torch's own batch-norm
    operators, on devices without a kernel of ours; `plain`, torch's elementwise operators and sums, for everything
    else. The call computes nothing and waits for no device.

    Args:
        layer: a layer of ours, to ask about its call on x as it is, in train or eval mode; or x alone, to ask about a
            training call with the options of torch.nn's layer; or nothing, to ask about the machine.
        x: the layer's input.
        mask: that of the call.

    Returns:
        A `Backends`, which prints as a table, with a `Backend` a row and `served_by`.

    Raises:
        TypeError: a module that is no layer of ours, or a layer without an input.

    Example:
        >>> x = torch.randn(8, 3, 5)
        >>> bn.backends(x).served_by
        'cpu'
        >>> asked = bn.backends(bn.BatchNorm1d(3), x.to("meta"), mask=torch.ones(8, 5, dtype=torch.bool))
        >>> for row in asked.rows:
        ...     print(row.name, "-", row.why_not or "serves this call")
        cpu - the input is on meta
        gpu - the input is on meta
        native - torch's batch norm has no mask
        plain - serves this call
    """
    if layer is None and x is None:
        return _table(choose.backends(None, Settings(1e-5, NONE), True), asked=False)
    if layer is None or isinstance(layer, Tensor):
        asked = x if layer is None else layer
        return _table(choose.backends(_operands(asked, mask), Settings(1e-5, NONE), True))
    if not isinstance(layer, Ours):
        raise TypeError(
            f"expected a batch-norm layer of ours, or a tensor, but got {type(layer).__name__}; convert the model "
            "first, with bn.convert(model), and ask about one of its layers"
        )
    options, measures = layer._batchnorm_options, layer.training or layer.running_mean is None
    settings = Settings(layer.eps, options.activation, options.virtual_batch_size or 0)
    over_ranks = options.sync and layer.training and several(options.process_group) is not None
    return _table(choose.backends(_operands(x, mask), settings, measures, options.renorm is not None, over_ranks))


def _operands(x: object, mask: Tensor | None) -> Operands:
    if not isinstance(x, Tensor):
        raise TypeError(f"expected the layer's input, a tensor, but got {type(x).__name__}: bn.backends(layer, x)")
    return Operands(x, None, None, None, mask)


def _table(found: list[choose.Backend], asked: bool = True) -> Backends:
    rows = [
        Backend(
            name=each.name,
            serves=each.serves,
            dtypes="torch's" if each.dtypes is None else " ".join(str(dtype)[6:] for dtype in each.dtypes),
            on=each.on,
            register_bits=each.register_bits,
            why_not=each.why_not,
        )
        for each in found
    ]
    return Backends(rows, next(row.name for row in rows if not row.why_not) if asked else None)
