"""One step of gamma or beta, worked through: the arithmetic of SGD, Adam and AdamW, line by line, in float64."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from .schema import LEARNED
from .update import Change, Update


class Term(NamedTuple):
    """One line of the arithmetic.

    Attributes:
        name: of what is computed: "gamma before", "gradient", "velocity", "gamma after", ...
        formula: how, in names: "momentum * velocity before + gradient"; "" of what was recorded.
        numbers: the formula with its numbers put in, to 6 digits; "" of what was recorded.
        value: the result.
    """

    name: str
    formula: str
    numbers: str
    value: float


@dataclass(frozen=True)
class Explanation:
    """One step of one number.

    Attributes:
        terms: what was recorded and what follows from it, in order; the last is the number after the step.
        predicted: the value after the step by the rule; None if the rule is unknown here, or was not followed.
        recorded: the value after the step as the optimizer left it.
        note: one sentence about a special case: a first step, a skipped one, an optimizer whose rule is unknown here;
            else "".
    """

    terms: tuple[Term, ...]
    predicted: float | None
    recorded: float
    note: str


@np.errstate(all="ignore")  # what is not finite is part of the story
def explain(update: Update, channel: int, quantity: str = "gamma") -> Explanation:
    """Spell out how the optimizer got from the value before a step to the one after it.

    The rules are those of torch.optim's SGD, Adam and AdamW with all their options, computed in float64 from the
    recorded float32 numbers: `predicted` is `recorded` but for the rounding of the optimizer's own arithmetic.

        SGD:    velocity = momentum * velocity + (1 - dampening) * gradient;  after = before - lr * velocity
        Adam:   m = beta1 * m + (1 - beta1) * gradient;  v = beta2 * v + (1 - beta2) * gradient^2
                after = before - lr * (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

    Args:
        update: from `Run.updates`.
        channel: the channel's number in the layer, one of `update.channels`.
        quantity: "gamma" or "beta".

    Raises:
        KeyError: no such quantity, the optimizer did not update it, or the channel was not kept.

    Example:
        >>> one = np.ones(1, np.float32)
        >>> options = {"lr": 0.5, "momentum": 0.5}
        >>> change = Change(one, one / 4, one * 0.75, {"momentum_buffer": one / 2}, "SGD", options, 0, False, "float32")
        >>> found = explain(Update(7, np.arange(1), change, None), 0)
        >>> for term in found.terms:
        ...     print(f"{term.name} = {term.formula or 'recorded'} = {term.numbers or term.value} = {term.value}")
        gamma before = recorded = 1.0 = 1.0
        gradient = recorded = 0.25 = 0.25
        velocity before = recorded = 0.5 = 0.5
        velocity = momentum * velocity before + gradient = 0.5 * 0.5 + 0.25 = 0.5
        gamma after = gamma before - lr * velocity = 1 - 0.5 * 0.5 = 0.75
        >>> found.predicted == found.recorded == 0.75
        True
    """
    if quantity not in LEARNED:
        raise KeyError(f"no quantity {quantity!r}; there are {', '.join(LEARNED)}")
    change = update.gamma if quantity == "gamma" else update.beta
    if change is None:
        raise KeyError(f"the optimizer did not update {quantity} in step {update.step}")
    place = int(np.searchsorted(update.channels, channel))
    if place == len(update.channels) or update.channels[place] != channel:
        raise KeyError(f"channel {channel} was not kept in step {update.step}; {len(update.channels)} others were")
    sheet = _Sheet(change, place, quantity)
    rule = _RULES.get(change.optimizer)
    recorded = float(change.after[place])
    if rule is None:
        note = f"The rule of {change.optimizer or 'the optimizer'} is not spelled out here."
        return sheet.unexplained(recorded, note)
    if change.skipped:
        note = "The gradient scaler found gradients that are not finite: the optimizer left everything as it was."
        return sheet.unexplained(recorded, note)
    note = rule(sheet)
    return Explanation(tuple(sheet.terms), sheet.terms[-1].value, recorded, note)


class _Sheet:
    """The lines so far, and the values that formulas may name.

    Args:
        change: of all channels.
        place: of the channel among them.
        quantity: "gamma" or "beta".
    """

    def __init__(self, change: Change, place: int, quantity: str) -> None:
        self._change, self._place = change, place
        self.terms: list[Term] = []
        self.before, self.after = f"{quantity} before", f"{quantity} after"
        self.steps = change.steps
        self.given(self.before, change.before)
        self.given("gradient", change.gradient)

    def option(self, name: str, default: float = 0.0) -> np.float64:
        return np.float64(self._change.options.get(name, default))

    def has(self, state: str) -> bool:
        return state in self._change.state

    def given(self, name: str, values: np.ndarray) -> np.float64:
        value = np.float64(values[self._place])
        self.terms.append(Term(name, "", "", float(value)))
        return value

    def state(self, name: str, called: str) -> np.float64:
        """A number of the optimizer's state, 0 before it has any."""
        values = self._change.state.get(name)
        return self.given(called, np.zeros(self._place + 1) if values is None else values)

    def value(self, name: str) -> np.float64:
        return np.float64(next(term.value for term in reversed(self.terms) if term.name == name))

    def compute(self, name: str, formula: str, value: Any, **numbers: Any) -> np.float64:
        """Add a line: `formula` has the names of earlier lines, and of `numbers`, which are put in for them."""
        known = {term.name: term.value for term in self.terms} | {key: float(number) for key, number in numbers.items()}
        longest = sorted(known, key=len, reverse=True)  # "velocity before" ahead of "velocity"
        names = re.compile(rf"\b({'|'.join(map(re.escape, longest))})\b")
        text = names.sub(lambda found: _in_formula(known[found[0]]), formula)
        self.terms.append(Term(name, formula, text, float(value)))
        return np.float64(value)

    def unexplained(self, recorded: float, note: str) -> Explanation:
        self.terms.append(Term(self.after, "", "", recorded))
        return Explanation(tuple(self.terms), None, recorded, note)


def _in_formula(value: float) -> str:
    text = f"{value:.6g}"
    return f"({text})" if text.startswith("-") else text


def _slope(sheet: _Sheet, decays: bool) -> tuple[str, np.float64]:
    """The gradient that the rule goes on with, and its name: negated where it maximizes, with weight decay in it."""
    named, slope, decay = "gradient", sheet.value("gradient"), sheet.option("weight_decay")
    if sheet.option("maximize"):
        named, slope = "gradient to descend", sheet.compute("gradient to descend", "-1 * gradient", -slope)
    if decays and decay:
        formula = f"{named} + weight_decay * {sheet.before}"
        slope = slope + decay * sheet.value(sheet.before)
        named = "decayed gradient"
        sheet.compute(named, formula, slope, weight_decay=decay)
    return named, slope


def _sgd(sheet: _Sheet) -> str:
    g, slope = _slope(sheet, decays=True)
    note = ""
    lr, momentum, dampening = sheet.option("lr"), sheet.option("momentum"), sheet.option("dampening")
    direction, called = slope, g
    if momentum:
        if sheet.has("momentum_buffer"):
            past = sheet.state("momentum_buffer", "velocity before")
            share = f"(1 - dampening) * {g}" if dampening else g
            velocity = momentum * past + (1 - dampening) * slope
            sheet.compute(
                "velocity", f"momentum * velocity before + {share}", velocity, momentum=momentum, dampening=dampening
            )
        else:
            velocity = sheet.compute("velocity", g, slope)
            note = "The first step with momentum: the velocity begins as the gradient."
        direction, called = velocity, "velocity"
        if sheet.option("nesterov"):
            direction, called = slope + momentum * velocity, "direction"
            sheet.compute(called, f"{g} + momentum * velocity", direction, momentum=momentum)
    sheet.compute(sheet.after, f"{sheet.before} - lr * {called}", sheet.value(sheet.before) - lr * direction, lr=lr)
    return note


def _adam(sheet: _Sheet, decoupled: bool = False) -> str:
    lr, eps, decay = sheet.option("lr"), sheet.option("eps"), sheet.option("weight_decay")
    beta1, beta2 = sheet.option("beta1"), sheet.option("beta2")
    t = np.float64(sheet.steps) + 1
    decoupled = bool(sheet.option("decoupled_weight_decay", decoupled))
    g, slope = _slope(sheet, decays=not decoupled)
    m = beta1 * sheet.state("exp_avg", "m before") + (1 - beta1) * slope
    sheet.compute("m", f"beta1 * m before + (1 - beta1) * {g}", m, beta1=beta1)
    v = beta2 * sheet.state("exp_avg_sq", "v before") + (1 - beta2) * slope * slope
    sheet.compute("v", f"beta2 * v before + (1 - beta2) * {g}^2", v, beta2=beta2)
    largest, called = v, "v"
    if sheet.option("amsgrad"):
        largest, called = np.maximum(sheet.state("max_exp_avg_sq", "largest v before"), v), "largest v"
        sheet.compute(called, "max(largest v before, v)", largest)
    first = sheet.compute("corrected m", "m / (1 - beta1^t)", m / (1 - beta1**t), beta1=beta1, t=t)
    second = sheet.compute("corrected v", f"{called} / (1 - beta2^t)", largest / (1 - beta2**t), beta2=beta2, t=t)
    start, begins = sheet.value(sheet.before), sheet.before
    if decoupled and decay:
        begins, start = "decayed", start * (1 - lr * decay)
        sheet.compute(begins, f"{sheet.before} * (1 - lr * weight_decay)", start, lr=lr, weight_decay=decay)
    after = start - lr * first / (np.sqrt(second) + eps)
    sheet.compute(sheet.after, f"{begins} - lr * corrected m / (sqrt(corrected v) + eps)", after, lr=lr, eps=eps)
    return "" if sheet.steps else "The first step: m and v begin at 0."


_RULES: dict[str, Callable[[_Sheet], str]] = {
    "SGD": _sgd,
    "Adam": _adam,
    "AdamW": lambda sheet: _adam(sheet, decoupled=True),
}
