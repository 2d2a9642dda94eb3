"""Rule: what every rule is. It says which evidence it can judge by which of four methods it has."""

from __future__ import annotations

import string
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from ..finding import Finding, Remedy, Severity, written

if TYPE_CHECKING:
    from ..history import History
    from ..layer import Layer
    from ..measured import Inputs, Measured
    from ..modes import Comparison

RECALIBRATE = "bn.recalibrate(model, batches)  # of training data; changes what eval mode computes"
SOURCES = ("layer", "run", "measured", "modes", "copies")


class Rule:
    """A rule has a name and one or more of the methods below; those that it lacks find nothing.

    Attributes:
        name: as in findings and in docs/diagnose.md.
        measured_is_better: what batches measure in a layer settles what its values alone make one suspect.
        needs: what `of_layer` has to know of a layer: "values", "settings" (a checkpoint has none), "place" (of a layer
            in its model) or "optimizer".
    """

    name: ClassVar[str]
    measured_is_better: ClassVar[bool] = False
    needs: ClassVar[str] = "values"

    def of_layer(self, layer: Layer) -> Iterator[Finding]:
        """Judge a layer as it stands: in a checkpoint, in a model, or at the end of a run."""
        yield from ()

    def of_run(self, history: History) -> Iterator[Finding]:
        """Judge what a run recorded of a layer, step by step."""
        yield from ()

    def of_measured(self, layer: Layer, measured: Measured) -> Iterator[Finding]:
        """Judge a layer of a model by what batches measure in it."""
        yield from ()

    def of_modes(self, comparison: Comparison, inputs: Inputs) -> Iterator[Finding]:
        """Judge the loss of a model in train and in eval mode, on such inputs."""
        yield from ()

    def of_copies(self, copies: Sequence[Layer]) -> Iterator[Finding]:
        """Judge copies of one layer, from ranks or replicas that ought to be the same."""
        yield from ()

    @property
    def sources(self) -> tuple[str, ...]:
        """Of `SOURCES` those that it can judge."""
        return tuple(name for name in SOURCES if getattr(type(self), f"of_{name}") is not getattr(Rule, f"of_{name}"))

    def found(
        self,
        layer: str | None,
        severity: Severity,
        evidence: str,
        remedy: str,
        *,
        target: str | None = None,
        since_step: int | None = None,
        confidence: float = 1.0,
        assumed: tuple[str, ...] = (),
        **numbers: float,
    ) -> Finding:
        """A finding of this rule.

        Args:
            layer: its name.
            severity: as in `Finding`.
            evidence: a format string of the numbers: "{leftover:.0%} of ...".
            remedy: Python, in which "{layer}" stands for the layer, or for `target`.
            target: the module that the remedy is for, if not the layer.
            since_step, confidence, numbers: as in `Finding`.
            assumed: what it hangs on that a checkpoint does not hold; see `Layer.assumes`.
        """
        said = _NUMBERS.format(evidence, **numbers)
        if assumed:
            said += f" ({' and '.join(assumed)}: assumed, as a checkpoint does not say)"
        cure = Remedy(remedy, target or layer)
        code = written([cure])
        return Finding(
            self.name, layer, severity, said, since_step, code, confidence, numbers, assumed=assumed, cure=cure
        )


class _Numbers(string.Formatter):
    """Format strings in which a share that is not 0 % (or 100 %) never looks as if it were."""

    def format_field(self, value: Any, format_spec: str) -> str:
        said = format(value, format_spec)
        if format_spec.endswith("%") and said.rstrip("%").strip("0.") in ("", "1") and value not in (0, 1):
            return percent(value)
        return said


def percent(value: float) -> str:
    """A share with as many digits as it takes to see that it is neither 0 nor 1."""
    digits = next((d for d in range(12) if 0 < round(value, d + 2) < 1), 12)
    return f"{value:.{digits}%}"


_NUMBERS = _Numbers()


def literal(name: str) -> str:
    """A name as it has to stand in evidence, where braces are replaced by numbers."""
    return name.replace("{", "{{").replace("}", "}}")
