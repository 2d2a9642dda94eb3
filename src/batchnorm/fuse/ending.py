"""A forward that ends in a batch norm, rewritten so that the batch norm may wait for what the parent does with it."""

from __future__ import annotations

import ast

from .patterns import IDENTITY, Patterns
from .syntax import become, computes, helper, is_name, path_of, target_of


def wait_at_the_end(definition: ast.FunctionDef, is_: Patterns, local: set[str]) -> str | None:
    """Rewrite `return self.bn(x)` at the end in place, or `v = self.bn(x)` before `return v`; the layer's path.

    Nothing runs after it in this forward, so nothing in it can tell that the batch norm has not run yet; only what an
    `if` would run that the module's attributes rule out, and that would find v computed. None, and nothing rewritten,
    where the forward ends in anything else.
    """
    *before, last = definition.body
    if not isinstance(last, ast.Return) or last.value is None:
        return None
    passed: list[ast.Call] = []
    ruled_out: list[tuple[ast.If, str]] = []
    value = last.value
    while True:
        if isinstance(value, ast.Call) and is_.starts(value):
            path = path_of(value.func, is_.self)
            if path is None or "[]" in path:
                return None
            for call in passed:
                become(call, helper("through", call.func, *call.args))
            for statement, v in ruled_out:
                statement.body.insert(0, computes(v, statement))
            become(value, helper("start", value.func, value.args[0]))
            ast.fix_missing_locations(definition)
            return path
        if isinstance(value, ast.Call) and is_.role(value.func) == IDENTITY and len(value.args) == 1:
            passed.append(value)
            value = value.args[0]
            continue
        if not (is_name(value) and value.id in local and before):
            return None
        statement = before.pop()
        if is_.is_alias(statement):
            continue
        if isinstance(statement, ast.If) and is_.taken(statement) == []:
            ruled_out.append((statement, value.id))
            continue
        if not (isinstance(statement, ast.Assign) and target_of(statement) == value.id):
            return None
        value = statement.value


def runs_quietly(definition: ast.FunctionDef, is_: Patterns) -> bool:
    """Whether all that the forward does is to hand values from one harmless module to the next."""
    *before, last = definition.body
    if before and isinstance(before[0], ast.Expr) and isinstance(before[0].value, ast.Constant):
        del before[0]  # its docstring
    hands_on = all(_hands_on(statement, is_) for statement in before)
    return hands_on and isinstance(last, ast.Return) and is_.quiet(last.value, None) is not None


def _hands_on(statement: ast.stmt, is_: Patterns) -> bool:
    """Whether it sets a variable by a harmless module, or does so under a condition that only looks."""
    if isinstance(statement, ast.If) and is_.looks(statement.test, None):
        return all(_hands_on(s, is_) for s in (*statement.body, *statement.orelse))
    if not isinstance(statement, ast.Assign) or target_of(statement) is None:
        return False
    return is_.is_alias(statement) or is_.quiet(statement.value, None) is not None
