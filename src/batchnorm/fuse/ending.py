"""A forward that ends in a batch norm, rewritten so that the batch norm may wait for what the parent does with it."""

from __future__ import annotations

import ast

from .patterns import IDENTITY, Patterns, become, helper, path_of, target_of


def wait_at_the_end(definition: ast.FunctionDef, is_: Patterns, local: set[str]) -> str | None:
    """Rewrite `return self.bn(x)` at the end in place, or `v = self.bn(x)` before `return v`; the layer's path.

    Nothing runs after it in this forward, so nothing in it can tell that the batch norm has not run yet. None, and
    nothing rewritten, where the forward ends in anything else.
    """
    *before, last = definition.body
    if not isinstance(last, ast.Return) or last.value is None:
        return None
    passed: list[ast.Call] = []
    value = last.value
    while True:
        if isinstance(value, ast.Call) and is_.starts(value):
            path = path_of(value.func, is_.self)
            if path is None or "[]" in path:
                return None
            for call in passed:
                become(call, helper("through", call.func, *call.args))
            become(value, helper("start", value.func, value.args[0]))
            ast.fix_missing_locations(definition)
            return path
        if isinstance(value, ast.Call) and is_.role(value.func) == IDENTITY and len(value.args) == 1:
            passed.append(value)
            value = value.args[0]
            continue
        if not (isinstance(value, ast.Name) and value.id in local and before):
            return None
        statement = before.pop()
        if not (isinstance(statement, ast.Assign) and target_of(statement) == value.id):
            return None
        value = statement.value


def runs_quietly(definition: ast.FunctionDef, is_: Patterns) -> bool:
    """Whether all that the forward does is to hand values from one harmless module to the next."""
    *before, last = definition.body
    if before and isinstance(before[0], ast.Expr) and isinstance(before[0].value, ast.Constant):
        del before[0]  # its docstring
    assigned = all(isinstance(s, ast.Assign) and target_of(s) and is_.quiet(s.value, None) is not None for s in before)
    return assigned and isinstance(last, ast.Return) and is_.quiet(last.value, None) is not None
