"""A few steps of the optimizer that a reader can check by hand: gamma before, its gradient, the rule, gamma after."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..runs.explain import explain
from .facts import plain
from .select import thin

if TYPE_CHECKING:
    from ..runs.update import Update
    from .select import Selection

# Worked numbers on a page, a few hundred bytes each; and steps of one channel, early, middle and late.
MOST_WORKED, MOST_STEPS, LEAST_STEPS = 400, 8, 3


def worked(selection: Selection) -> list[dict[str, Any] | None]:
    """Return for each shown layer the steps that were recorded whole, worked out; None where there are none.

    Returns:
        "steps" (U,), and for each of "gamma" and "beta", by the shown channel's place (the first ones, as many as fit),
        a list of U: the terms of the arithmetic (see `runs.explain`), what they predict, what was recorded, a note, and
        the optimizer; None where the optimizer had nothing to do with it.
    """
    places = sum(len(view.channels) for view in selection.layers)
    most = min(MOST_STEPS, max(LEAST_STEPS, MOST_WORKED // max(1, 2 * places)))
    deep = max(1, MOST_WORKED // (2 * most * max(1, len(selection.layers))))  # channels of a layer
    found: list[dict[str, Any] | None] = []
    for view in selection.layers:
        updates = selection.run.updates(view.info.name)
        chosen = [updates[i] for i in _early_middle_late(len(updates), most)] if updates else []
        if not chosen:
            found.append(None)
            continue
        numbers = {
            quantity: [
                [_worked(update, channel, quantity) for update in chosen] for channel in view.channels[:deep].tolist()
            ]
            for quantity in ("gamma", "beta")
        }
        found.append(plain({"steps": [update.step for update in chosen], **numbers}))
    return found


def _early_middle_late(n: int, most: int) -> list[int]:
    """Return at most so many indices of range(n), in pairs of neighbors: what one leaves is where the next begins."""
    if n <= most:
        return list(range(n))
    starts = thin(n - 1, max(1, most // 2)).tolist()
    return sorted({i for start in starts for i in (start, start + 1)})[:most] if most > 1 else [0]


def _worked(update: Update, channel: int, quantity: str) -> dict[str, Any] | None:
    try:
        made = explain(update, channel, quantity)
    except KeyError:  # frozen, or a channel that was not kept
        return None
    change = update.gamma if quantity == "gamma" else update.beta
    assert change is not None
    terms = [[term.name, term.formula, term.numbers, term.value] for term in made.terms]
    said = {"terms": terms, "predicted": made.predicted, "recorded": made.recorded, "note": made.note}
    return said | {"optimizer": change.optimizer, "lr": change.options.get("lr"), "dtype": change.dtype}
