"""A method's source as a syntax tree, proven to be the code that was loaded; and a tree compiled into a method."""

from __future__ import annotations
import __future__

import ast
import copy
import functools
import inspect
from collections.abc import Callable
from types import CellType, CodeType, FunctionType
from typing import Any

_FUTURE = sum({getattr(__future__, name).compiler_flag for name in __future__.all_feature_names} - {inspect.CO_NESTED})

WRAPPED = "is not a plain function: something is wrapped around it"


class Unreadable(Exception):
    """Why the source of a method cannot be used."""


@functools.lru_cache(maxsize=256)
def read(function: Any) -> ast.FunctionDef:
    """The definition of a method, with the line numbers of its file; not to be changed, for it is shared.

    Raises:
        Unreadable: there is no source, or it is not what was loaded: a decorated method, a file that has changed.
    """
    if not isinstance(function, FunctionType) or hasattr(function, "__wrapped__"):
        raise Unreadable(WRAPPED)
    try:
        lines, _ = inspect.findsource(function.__code__)
        tree, codes = _parsed("".join(lines), function.__code__.co_filename)
    except (OSError, SyntaxError, TypeError, ValueError):
        raise Unreadable("has no readable source") from None
    if function.__code__ not in codes:
        raise Unreadable("differs from its source file: the file was edited, or an import changed the function")
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name == function.__code__.co_name:
            first = min(n.lineno for n in (node, *node.decorator_list))
            if first == function.__code__.co_firstlineno:
                return node
    raise Unreadable("is not defined by a def statement")


@functools.lru_cache(maxsize=16)
def _parsed(text: str, filename: str) -> tuple[ast.Module, set[CodeType]]:
    """The tree of a file, and the code of every function in it as it would be loaded now."""
    tree = ast.parse(text)
    codes, found = [compile(tree, filename, "exec", dont_inherit=True)], set()
    while codes:
        inner = {constant for constant in codes.pop().co_consts if isinstance(constant, CodeType)}
        codes += inner - found
        found |= inner
    return tree, found


def build(
    definition: ast.FunctionDef, function: FunctionType, owner: type, names: dict[str, Callable[..., Any]]
) -> FunctionType:
    """The method of this definition: in everything but its code, and `names`, which it can use, it is `function`."""
    code = _compiled(definition, function, owner, [*function.__code__.co_freevars, *names])
    cells = {name: CellType(value) for name, value in names.items()}
    cells.update(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    built = FunctionType(
        code, function.__globals__, function.__name__, function.__defaults__, tuple(cells[n] for n in code.co_freevars)
    )
    built.__kwdefaults__ = function.__kwdefaults__
    built.__annotations__ = function.__annotations__
    built.__qualname__ = function.__qualname__
    built.__doc__ = function.__doc__
    return built


def _compiled(definition: ast.FunctionDef, function: FunctionType, owner: type, outside: list[str]) -> CodeType:
    """Its code, in the scopes it had: a class, for private names and super(), in a function, for names from outside."""
    bare = copy.copy(definition)
    bare.decorator_list, bare.returns, bare.args = [], None, copy.deepcopy(definition.args)
    # Defaults and annotations belong to the function, not to its code.
    bare.args.defaults, bare.args.kw_defaults = [], [None] * len(bare.args.kwonlyargs)
    every = (*bare.args.posonlyargs, *bare.args.args, *bare.args.kwonlyargs, bare.args.vararg, bare.args.kwarg)
    for argument in every:
        if argument is not None:
            argument.annotation = None
    names, name = ", ".join(name for name in outside if name != "__class__"), owner.__name__
    # The class's own name means in there what it meant: a variable of the module, unless it was one of a function.
    theirs = "pass" if name in outside else f"global {name}"
    tree = ast.parse(f"def scope({names}):\n {theirs}\n class {name}:\n  pass")
    tree.body[0].body[1].body = [bare]  # pyright: ignore[reportAttributeAccessIssue]
    flags = function.__code__.co_flags & _FUTURE
    code = compile(tree, function.__code__.co_filename, "exec", flags=flags, dont_inherit=True)
    for _ in range(3):
        code = next(constant for constant in code.co_consts if isinstance(constant, CodeType))
    return code
