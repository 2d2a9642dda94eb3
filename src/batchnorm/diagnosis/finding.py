"""Finding: one thing that is wrong, in one layer or in many, with its evidence and its remedy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from ..view.facts import plain
from .layer import ITSELF

Severity = Literal["serious", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("serious", "warning", "note")


@dataclass(frozen=True)
class Remedy:
    """What to do: Python, in which "{layer}" stands for a module, and the name of that module in the model."""

    code: str
    target: str | None = None


@dataclass(frozen=True)
class Finding:
    """One thing that a rule found wrong.

    Attributes:
        rule: its name, as in the table of docs/diagnose.md.
        layer: the layer's name in the model, or the first of several; None for the whole model or training.
        severity: "serious" (what the model computes is wrong or will be), "warning" (likely harm), "note" (waste, or
            harm only in some circumstances).
        evidence: a sentence with the numbers that were found; of several layers, those of `layer`.
        since_step: the step of a run at which it began, the earliest of its layers; None without a run, or if unknown.
        remedy: what to do: Python that runs as it stands, for all the layers. It does not change what a trained model
            computes, or says in a comment what it changes.
        confidence: from 0 to 1: how likely it is that this is the fault, and not something similar.
        numbers: those of the evidence, by name.
        layers: all that share it, in model order.
        sources: which of several runs or checkpoints; () if there is only one.
        assumed: "eps" or "momentum", if the finding depends on it and it was not known: PyTorch's default was assumed.
        each: the finding of each layer, if there are several.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3, momentum=0.99))
        >>> finding = bn.diagnose(model)[0]
        >>> finding.rule, finding.severity, finding.layer
        ('momentum', 'serious', '1')
    """

    rule: str
    layer: str | None
    severity: Severity
    evidence: str
    since_step: int | None
    remedy: str
    confidence: float
    numbers: Mapping[str, float] = field(default_factory=dict, hash=False)
    layers: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    assumed: tuple[str, ...] = ()
    each: tuple[Finding, ...] = ()
    cure: Remedy | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.layers and self.layer is not None:
            object.__setattr__(self, "layers", (self.layer,))

    def to_dict(self) -> dict[str, Any]:
        """All of it in JSON's own types; a number that is not finite becomes None."""
        said = {each.name: getattr(self, each.name) for each in fields(self) if each.name not in ("each", "cure")}
        return plain({**said, "each": [finding.to_dict() for finding in self.each]})

    def _repr_html_(self) -> str:
        from .notebook import findings_html

        return findings_html([self])


def joined(found: Sequence[Finding]) -> Finding:
    """One finding of those of several layers, or sources, that have a rule, a severity and a cure in common."""
    if len(found) == 1:
        return found[0]
    worst = max(found, key=lambda finding: finding.confidence)
    layers = tuple(dict.fromkeys(name for finding in found for name in finding.layers))
    steps = [finding.since_step for finding in found if finding.since_step is not None]
    many = f"{len(layers)} layers: " if len(layers) > 1 else ""
    where = f" ({worst.layer})" if len(layers) > 1 else ""
    cures = [finding.cure for finding in found if finding.cure is not None]
    return Finding(
        worst.rule,
        worst.layer,
        worst.severity,
        many + worst.evidence + where,
        min(steps, default=None),
        written(cures) if cures else worst.remedy,
        worst.confidence,
        worst.numbers,
        layers,
        tuple(dict.fromkeys(name for finding in found for name in finding.sources)),
        tuple(dict.fromkeys(name for finding in found for name in finding.assumed)),
        tuple(found),
    )


def written(cures: Sequence[Remedy]) -> str:
    """The code of remedies that are alike but for their targets: a statement, or a loop over the modules."""
    code = cures[0].code
    targets = list(dict.fromkeys(cure.target for cure in cures if cure.target is not None))
    if "{layer}" not in code or not targets:
        return code
    if len(targets) == 1:
        return code.replace("{layer}", "model" if targets[0] == ITSELF else f"model.get_submodule({targets[0]!r})")
    lines = code.replace("{layer}", "layer").splitlines()
    return f"for layer in map(model.get_submodule, {targets!r}):\n" + "\n".join(f"    {line}" for line in lines)
