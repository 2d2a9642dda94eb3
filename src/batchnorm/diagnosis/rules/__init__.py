"""The rules, one a file, in the order of docs/diagnose.md."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ..finding import Finding
from .axis import Axis
from .bias import Bias
from .dead import Dead
from .decay import Decay
from .eval_gap import EvalGap
from .few_values import FewValues
from .freeze_leak import FreezeLeak
from .mixed import Mixed
from .mode import Mode
from .nonfinite import Nonfinite
from .padding import Padding
from .ported import Ported
from .preprocessing import Preprocessing
from .ranks import Ranks
from .rule import Rule
from .small_variance import SmallVariance
from .unconverged import Unconverged
from .untracked import Untracked
from .updates import Updates

RULES: tuple[Rule, ...] = (
    EvalGap(),
    Preprocessing(),
    Unconverged(),
    Nonfinite(),
    FreezeLeak(),
    Updates(),
    FewValues(),
    Ported(),
    Ranks(),
    Padding(),
    Untracked(),
    Mixed(),
    Bias(),
    SmallVariance(),
    Axis(),
    Dead(),
    Decay(),
    Mode(),
)


SETTLED = frozenset(rule.name for rule in RULES if rule.measured_is_better)


def judge(source: str, *evidence: object) -> Iterator[Finding]:
    """What all rules find in evidence of that source: "layer", "run", "measured", "modes" or "copies"."""
    for rule in RULES:
        found: Iterable[Finding] = getattr(rule, f"of_{source}")(*evidence)
        yield from found
