"""Why a batch norm is not fused with the activation that its output goes into: said once, where that is not fused."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from .patterns import Patterns
from .syntax import is_name, scope, target_of

_BETWEEN = "this is between a batch norm and its activation, and may read the batch norm's output"
ADDED_AFTER = "the other summand is computed after the batch norm and may change the batch norm's input"
ELSEWHERE = "the batch norm is in one module, its activation within another"


class Reasons:
    """What stands in the way in one method; `returns` says that its value comes from a batch norm, in a sum or not."""

    def __init__(self, definition: ast.FunctionDef, is_: Patterns) -> None:
        self.is_ = is_
        self.returns = False
        statements = [n for n in ast.walk(definition) if isinstance(n, ast.stmt)]
        self._written = {n: ast.unparse(n).splitlines()[0] for n in statements}
        self._said: list[tuple[str, ast.Call | None]] = []
        self._if_silent: list[tuple[str, ast.Call | None]] = []

    def stands_for(self, edited: ast.stmt, statement: ast.stmt) -> None:
        """The edited statement was written as the other."""
        self._written[edited] = self._written[statement]

    def leave(
        self, statement: ast.stmt, reason: str, activation: ast.Call | None = None, expected: bool = True
    ) -> None:
        """Say it of the statement unless the activation is fused after all, with another summand.

        What is said of an unexpected one, a module that ends in a batch norm, counts where nothing else is said.
        """
        why = f"line {statement.lineno}, `{self._written[statement]}`: {reason}"
        (self._said if expected else self._if_silent).append((why, activation))

    def blame(self, statement: ast.stmt, reason: str, rest: list[ast.stmt], v: str, expected: bool = True) -> None:
        """Leave it, if v goes into an activation in the rest."""
        for use in self.uses(rest, v):
            if isinstance(use, ast.Call):
                self.leave(statement, reason if self.is_.given(use) is None else ELSEWHERE, use, expected)
                return
            self.returns = True

    def stands_between(
        self, statement: ast.stmt, rest: list[ast.stmt], v: str, why: str = "", expected: bool = True
    ) -> None:
        """Blame the statement for what waits in v."""
        value = getattr(statement, "value", None)
        parts = self.is_.parts(statement.value) if isinstance(statement, ast.Assign) else []
        others = [part for part in parts if not is_name(part, v)]
        if any(isinstance(n, ast.Attribute) and n.attr == "add_relu" for n in ast.walk(statement)):
            self.leave(statement, "add_relu may observe the sum, as for quantization")
        elif isinstance(statement, ast.AugAssign) and is_name(statement.target) and is_name(value, v):
            self.adds_into(statement, rest[1:], expected)
        elif len(others) == 1 < len(parts) and isinstance(others[0], ast.Call) and not self.is_.starts(others[0]):
            self.blame(statement, why or ADDED_AFTER, rest, v, expected)
        else:
            self.blame(statement, why or _BETWEEN, rest, v, expected)

    def adds_into(self, statement: ast.AugAssign, rest: list[ast.stmt], expected: bool = True) -> None:
        """Blame `y += v`."""
        if isinstance(statement.target, ast.Name):
            self.blame(statement, "the sum is written into the other summand", rest, statement.target.id, expected)

    def left(self) -> list[str]:
        """What was said, of each activation once, of none that is fused."""
        left: dict[str, ast.Call | None] = {}
        for why, activation in (*self._said, *self._if_silent):
            said = activation is not None and any(activation is other for other in left.values())
            if not said and not _is_fused(activation):
                left[why] = activation
        return list(left)

    def uses(self, rest: list[ast.stmt], v: str) -> Iterator[ast.Call | ast.Return]:
        """The activations that v goes into, alone or in a sum, before it gets another value, and its returns."""
        carry = {v}
        for statement in self._taken(rest):
            for node in scope(statement):
                value = node.value if isinstance(node, ast.Return) else self.is_.activated(node) or self.is_.given(node)
                if value is not None and self._carries(value, carry) and isinstance(node, ast.Call | ast.Return):
                    yield node
            linked = {w for n in scope(statement) if isinstance(n, ast.stmt) and (w := self._linked(n, carry))}
            # What an if sets, it may not set, unless both branches do.
            both = [statement.body, statement.orelse] if isinstance(statement, ast.If) else [[statement]]
            carry = (carry - set.intersection(*map(_stored, both))) | linked
            if not carry:
                return

    def _linked(self, statement: ast.stmt, carry: set[str]) -> str | None:
        """The variable into which a statement puts what one of these has, alone or in a sum."""
        w, value = target_of(statement), getattr(statement, "value", None)
        if isinstance(statement, ast.AugAssign):
            adds = isinstance(statement.op, ast.Add) and (w in carry or self._carries(statement.value, carry))
            return w if adds else None
        links = value is not None and (self._carries(value, carry) or any(self.is_.passes(statement, v) for v in carry))
        return w if links else None

    def _carries(self, value: ast.expr, carry: set[str]) -> bool:
        value = self.is_.unwrapped(value)
        parts = map(self.is_.unwrapped, [value, *self.is_.parts(value)])
        return any(is_name(part) and part.id in carry for part in parts)

    def _taken(self, statements: list[ast.stmt]) -> Iterator[ast.stmt]:
        """The statements without the conditions that are decided by what the module has."""
        for statement in statements:
            if isinstance(statement, ast.If) and (taken := self.is_.taken(statement)) is not None:
                yield from self._taken(taken)
            else:
                yield statement


def _is_fused(activation: ast.Call | None) -> bool:
    """Whether the call has been rewritten."""
    func = None if activation is None else activation.func
    return isinstance(func, ast.Name) and func.id.startswith("_batchnorm_finish")


def _stored(block: list[ast.stmt]) -> set[str]:
    nodes = (n for statement in block for n in scope(statement))
    return {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
