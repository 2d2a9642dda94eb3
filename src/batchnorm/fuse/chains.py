"""What a statement is to a batch norm that may wait: it begins the chain to the activation, or runs meanwhile."""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .patterns import Patterns
from .syntax import helper, is_name, target_of


@dataclass
class Chain:
    """What waits from `v = self.bn(x)` on: in which variable, what runs meanwhile, how all of it is rewritten."""

    first: ast.stmt
    start: ast.Call
    v: str
    between: list[str] = field(default_factory=list)
    added: bool = False
    fuses: bool = True
    expected: bool = True  # whether it is a batch norm, and not a module that ends in one
    edits: list[Callable[[], Any]] = field(default_factory=list)
    otherwise: Chain | None = None  # what waits in the same variable, where an if went the other way


def begin(is_: Patterns, first: ast.stmt) -> Chain | None:
    """`v = self.bn(x)`, alone or as all that an `if` does, or `v = self.bn(x) + y`, or a loop of these."""
    if isinstance(first, ast.For):
        return _begin_in_loop(is_, first)
    if isinstance(first, ast.If) and len(first.body) == len(first.orelse) == 1 and is_.looks(first.test, None):
        chain, other = begin(is_, first.body[0]), begin(is_, first.orelse[0])
        if chain is None or other is None:
            # The other branch sets the same variable to anything else, or nothing waits.
            one, instead = chain or other, first.body[0] if chain is None else first.orelse[0]
            sets = one is not None and isinstance(instead, ast.Assign) and target_of(instead) == one.v
            return one if sets else None
        if chain.v != other.v:
            return None
        chain.otherwise, chain.added = other, chain.added or other.added
        chain.edits += other.edits
        return chain
    if isinstance(first, ast.If) and len(first.body) == 1 and not first.orelse and is_.looks(first.test, None):
        return begin(is_, first.body[0]) if isinstance(first.body[0], ast.Assign) else None
    v = target_of(first)
    if v is None or not isinstance(first, ast.Assign):
        return None
    if isinstance(first.value, ast.Call) and is_.starts(first.value):
        return Chain(first, first.value, v)
    found = is_.sum_of(first.value, None)
    if found is None or not isinstance(found.start, ast.Call):
        return None
    chain = Chain(first, found.start, v, found.between, added=True)
    chain.edits.append(lambda: setattr(first, "value", found.call))
    return chain


def _begin_in_loop(is_: Patterns, loop: ast.For) -> Chain | None:
    """`for bn in self.bns: v = v + bn(x)`, where each round computes what the one before it left waiting."""
    only = loop.body[0]
    if len(loop.body) > 1 or loop.orelse or not isinstance(only, ast.Assign) or not is_.over_modules(loop.iter):
        return None
    chain, sum_ = begin(is_, only), only.value
    if chain is None or not isinstance(sum_, ast.BinOp) or not is_name(sum_.left, chain.v):
        return None
    if loads(loop, chain.v) > 1 or chain.start is not sum_.right:
        return None
    chain.edits.append(lambda: _compute_first(only))
    return chain


def quiet_statement(is_: Patterns, statement: ast.stmt) -> list[str] | None:
    """The modules called by a statement that only sets variables, by harmless modules; None for any other."""
    if isinstance(statement, ast.Pass) or is_.is_alias(statement):
        return []
    if isinstance(statement, ast.If) and is_.looks(statement.test, None):
        parts = [quiet_statement(is_, s) for s in (*statement.body, *statement.orelse)]
        return None if None in parts else [path for part in parts if part for path in part]
    if isinstance(statement, ast.Assign | ast.AnnAssign) and target_of(statement):
        return is_.quiet(statement.value, None)
    return None


def loads(node: ast.AST, name: str) -> int:
    """How often the value of the name is asked for, as `name += ...` does too."""
    nodes = list(ast.walk(node))
    names = (n for n in nodes if is_name(n, name) and not isinstance(n.ctx, ast.Store))
    return sum(1 for _ in names) + sum(isinstance(n, ast.AugAssign) and is_name(n.target, name) for n in nodes)


def _compute_first(statement: ast.Assign) -> None:
    """Compute the first summand of the addition, which has been rewritten, before the second one runs."""
    assert isinstance(statement.value, ast.Call)
    statement.value.args[1] = helper("computed", statement.value.args[1])
