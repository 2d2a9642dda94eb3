"""Pieces of a syntax tree that mean the same in every module: names, paths, scopes, and calls of our helpers."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import Any, TypeGuard

from . import calls

# Names under which the rewritten source finds what it calls.
HELPERS: dict[str, Any] = {
    "_batchnorm_start": calls.start,
    "_batchnorm_add": calls.add,
    "_batchnorm_through": calls.through,
    "_batchnorm_computed": calls.computed,
    "_batchnorm_finish": calls.finish,
    "_batchnorm_finish_method": calls.finish_method,
    "_batchnorm_plus": calls.operator.add,
    "_batchnorm_plus_in_place": calls.operator.iadd,
    "_batchnorm_method": calls.add_by_method,
    "_batchnorm_method_in_place": calls.add_by_method_in_place,
}
_OWN_SCOPE = (ast.Lambda, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
_OWN_SCOPE += (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def helper(name: str, *args: ast.expr) -> ast.Call:
    """A call of a helper."""
    return ast.Call(ast.Name(f"_batchnorm_{name}", ast.Load()), list(args), [])


def computes(v: str, where: ast.stmt) -> ast.Assign:
    """`v = computed(v)`, so that nothing waits in v."""
    statement = ast.Assign([ast.Name(v, ast.Store())], helper("computed", ast.Name(v, ast.Load())))
    return ast.copy_location(statement, where)


def become(call: ast.Call, other: ast.Call) -> None:
    """Make the call the other one, in place."""
    call.func, call.args, call.keywords = other.func, other.args, other.keywords


def scope(node: ast.AST) -> Iterator[ast.AST]:
    """The node and all below it, but not what runs in a scope of its own."""
    yield node
    for below in ast.iter_child_nodes(node):
        if not isinstance(below, _OWN_SCOPE):
            yield from scope(below)


def target_of(statement: ast.stmt) -> str | None:
    """v, where the statement is `v = ...` or `v += ...`."""
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
        target = statement.targets[0]
    else:
        target = statement.target if isinstance(statement, ast.AugAssign | ast.AnnAssign) else None
    return target.id if isinstance(target, ast.Name) else None


def is_name(node: ast.AST | None, name: str | None = None) -> TypeGuard[ast.Name]:
    """Whether it is a variable, this one if one is given."""
    return isinstance(node, ast.Name) and name in (None, node.id)


def mentions(node: ast.AST, name: str) -> bool:
    """Whether the name occurs anywhere in it."""
    return any(isinstance(n, ast.Name) and n.id == name for n in ast.walk(node))


def path_of(node: ast.expr, self: str) -> str | None:
    """`a.b` for the expression self.a.b, `a[]` for self.a[i]; None for anything else."""
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Name | ast.Constant):
        path = path_of(node.value, self)
        return None if path is None else f"{path}[]"
    if not isinstance(node, ast.Attribute):
        return None
    if isinstance(node.value, ast.Name):
        return node.attr if node.value.id == self else None
    path = path_of(node.value, self)
    return None if path is None else f"{path}.{node.attr}"


def passing(node: ast.expr) -> ast.expr:
    """The variable, or the calls of identities around it rewritten to let a pending value pass."""
    return helper("through", node.func, *map(passing, node.args)) if isinstance(node, ast.Call) else node


def looped(values: ast.expr) -> list[ast.expr] | None:
    """What `zip` or `enumerate` goes through, beside each other."""
    if not (isinstance(values, ast.Call) and isinstance(values.func, ast.Name)) or values.keywords:
        return None
    return {"zip": values.args, "enumerate": [ast.Constant(0), *values.args]}.get(values.func.id)


def plain(node: ast.expr) -> bool:
    """Whether it is a name, a constant, or an attribute of a name: evaluating it runs nothing."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return isinstance(node, ast.Name | ast.Constant)
