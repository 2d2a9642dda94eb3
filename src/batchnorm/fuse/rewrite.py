"""Where in a method's source a batch norm may wait for the addition and the activation after it.

It waits inside one expression, `act(self.bn(x) + y)`, and over statements of one block:

    v = self.bn(x);   identity = self.shortcut(y);   v += identity;   v = act(v)

where nothing runs in between but what `patterns` calls quiet, and nobody else reads v. Only calls are changed, to those
of `calls`; the statements, their order and every condition stay as they were written.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from .patterns import ABSENT, IDENTITY, LAYER, Patterns, become, helper, mentions, path_of, scope, target_of

_BLOCKS = (ast.If, ast.For, ast.AsyncFor, ast.While)


@dataclass
class _Chain:
    """What waits from `v = self.bn(x)` on: in which variable, what runs meanwhile, how all of it is rewritten."""

    first: ast.stmt
    start: ast.Call
    v: str
    between: list[str] = field(default_factory=list)
    added: bool = False
    fuses: bool = True
    named: bool = True  # whether it is said why it is not fused
    edits: list[Callable[[], Any]] = field(default_factory=list)
    otherwise: _Chain | None = None  # what waits in the same variable, where an if went the other way


class Rewriter:
    """Rewrites one definition in place; then `fused` says what was fused, and `left` what was not and why."""

    def __init__(self, definition: ast.FunctionDef, self_name: str, roles: dict[str, str], local: set[str]) -> None:
        self.definition, self.local = definition, local
        self.is_ = Patterns(self_name, roles, definition)
        self.fused: list[str] = []
        self.left: list[str] = []
        statements = [n for n in ast.walk(definition) if isinstance(n, ast.stmt)]
        self._written = {n: ast.unparse(n).splitlines()[0] for n in statements}
        # Statements first: they are judged as they were written.
        self._block(definition.body, True, [])
        for statement in statements:
            self._expressions(statement)
        ast.fix_missing_locations(definition)

    def _leave(self, statement: ast.stmt, reason: str) -> None:
        why = f"line {statement.lineno}, `{self._written[statement]}`: {reason}"
        if why not in self.left:
            self.left.append(why)

    def _fuse(self, start: ast.Call, added: bool, finish: ast.Call, between: list[str]) -> None:
        """Rewrite the first call and the last."""
        activation = path_of(finish.func, self.is_.self) or ast.unparse(finish.func).split(".")[-1]
        name = ast.unparse(start.func)
        layer = path_of(start.func, self.is_.self) or self.is_.loops.get(name, name)
        self.fused.append(" + ".join([layer, *["add"] * added, activation]))
        self._wait(start, between)
        value = self.is_.activated(finish)
        if value is not None and finish.args and finish.args[0] is value:
            become(finish, ast.Call(helper("finish").func, [finish.func, *finish.args], finish.keywords))
        elif value is not None and isinstance(finish.func, ast.Attribute):
            become(finish, helper("finish_method", ast.Constant(finish.func.attr), value))

    def _wait(self, start: ast.Call, between: list[str]) -> None:
        names = ast.Tuple([ast.Constant(path) for path in dict.fromkeys(between)], ast.Load())
        extra = [ast.Name(self.is_.self, ast.Load()), names] if between else []
        become(start, helper("start", start.func, start.args[0], *extra))

    # Inside one expression.

    def _expressions(self, statement: ast.stmt) -> None:
        own = [n for n in ast.iter_child_nodes(statement) if isinstance(n, ast.expr | ast.keyword | ast.withitem)]
        for node in [n for part in own for n in ast.walk(part) if isinstance(n, ast.Call)]:
            value = self.is_.activated(node)
            if value is None:
                continue
            found = self.is_.sum_of(value, None)
            if isinstance(value, ast.Call) and self.is_.starts(value):
                self._fuse(value, False, node, [])
            elif found is not None and isinstance(found.start, ast.Call):
                start = found.start
                _replace(node, value, found.call)
                self._fuse(start, True, node, found.between)
            elif any(self.is_.starts(n) for n in self.is_.parts(value)):
                self._leave(statement, "what is added runs after the batch norm and may change what it reads")

    # Over statements.

    def _block(self, block: list[ast.stmt], fuses: bool, after: list[ast.stmt]) -> None:
        for i, statement in enumerate(block):
            if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                if any(self.is_.starts(n) for s in ast.walk(statement) for n in [getattr(s, "value", None)]):
                    self._leave(statement, "statements of a function inside a function are not looked into")
                continue
            chain = self._begin(statement)
            if chain is not None:
                chain.fuses = fuses
                chain.named = self.is_.role(chain.start.func) == LAYER
                self._follow(chain, block, i, after)
                if isinstance(statement, ast.If):
                    continue  # it has been looked into
            rest = [*block[i + 1 :], *after]
            if isinstance(statement, ast.AugAssign) and self.is_.starts(statement.value):
                self._adds_into(statement, rest)
            # What handles an exception may read a variable before it has its value.
            inside = fuses and isinstance(statement, _BLOCKS)
            for name in ("body", "orelse", "finalbody"):
                self._block(getattr(statement, name, []), inside, rest)
            for part in (*getattr(statement, "handlers", ()), *getattr(statement, "cases", ())):
                self._block(part.body, False, rest)

    def _begin(self, first: ast.stmt) -> _Chain | None:
        """`v = self.bn(x)`, alone or as all that an `if` does, or `v = self.bn(x) + y`."""
        if isinstance(first, ast.If) and len(first.body) == len(first.orelse) == 1 and self.is_.looks(first.test, None):
            chain, other = self._begin(first.body[0]), self._begin(first.orelse[0])
            if chain is None or other is None or chain.v != other.v:
                return None
            chain.otherwise, chain.added = other, chain.added or other.added
            chain.edits += other.edits
            return chain
        if isinstance(first, ast.If) and len(first.body) == 1 and not first.orelse and self.is_.looks(first.test, None):
            only = first.body[0]
            v = target_of(only) if isinstance(only, ast.Assign) else None
            if v is not None and isinstance(only, ast.Assign) and isinstance(only.value, ast.Call):
                return _Chain(only, only.value, v) if self.is_.starts(only.value) else None
            return None
        v = target_of(first)
        if v is None or not isinstance(first, ast.Assign):
            return None
        if isinstance(first.value, ast.Call) and self.is_.starts(first.value):
            return _Chain(first, first.value, v)
        found = self.is_.sum_of(first.value, None)
        if found is None or not isinstance(found.start, ast.Call):
            return None
        chain = _Chain(first, found.start, v, found.between, added=True)
        chain.edits.append(lambda: setattr(first, "value", found.call))
        return chain

    def _follow(self, chain: _Chain, block: list[ast.stmt], i: int, after: list[ast.stmt]) -> None:
        """Rewrite the block from the chain's first statement to act(v), or say what is in the way, or neither."""
        for j in range(i + 1, len(block)):
            statement, v, rest = block[j], chain.v, block[j:]
            if not mentions(statement, v):
                called = self._quiet_statement(statement)
                if called is None:
                    self._stands_between(chain, statement, rest, v)
                    return
                chain.between += called
                continue
            w = target_of(statement)
            in_place = isinstance(statement, ast.Expr) and _adds_in_place(statement.value)
            ends = isinstance(statement, ast.Return | ast.If) or in_place or w == v
            if not ends and not self._dead(v, block[i + 1 : j + 1]):
                self._stands_between(chain, statement, rest, v, "its output is used again")
                return
            finish = self._finish(statement, v)
            if finish is None and isinstance(statement, ast.If):
                finish = self._finish_if(chain, statement, block)
            if finish is not None:
                self._end(chain, finish)
                return
            if not self._link(chain, block, j):
                self._stands_between(chain, statement, rest, v)
                return
            chain.v = w or v
            if chain.v not in self.local:
                break
        if chain.named and self._activated_in(after, chain.v):
            self._leave(chain.first, "the block ends before the activation")

    def _end(self, chain: _Chain, finish: ast.Call) -> None:
        value = self.is_.activated(finish)
        last = None if value is None else self.is_.sum_of(value, chain.v)
        if not chain.fuses:
            self._leave(chain.first, "inside a with, try or match statement")
        elif target_of(chain.first) not in self.local:
            self._leave(chain.first, "another function sees the variable")
        elif last is None or not chain.added:
            if last is not None and value is not None:
                chain.between += last.between
                chain.added = True
                _replace(finish, value, last.call)
            for edit in chain.edits:
                edit()
            self._fuse(chain.start, chain.added, finish, chain.between)
            if chain.otherwise is not None:
                self._wait(chain.otherwise.start, [*chain.otherwise.between, *chain.between])

    def _finish(self, statement: ast.stmt, v: str) -> ast.Call | None:
        """act(v) in `w = ... act(v) ...` or `return ... act(v) ...`, v's only mention."""
        if not isinstance(statement, ast.Assign | ast.Return) or statement.value is None:
            return None
        if _loads(statement, v) != 1 or (isinstance(statement, ast.Assign) and len(statement.targets) != 1):
            return None
        return self.is_.finish_in(statement.value, v)

    def _finish_if(self, chain: _Chain, statement: ast.If, block: list[ast.stmt]) -> ast.Call | None:
        """act(v) in `if ...: v = act(v)`, after which v is computed in any case."""
        v = chain.v
        if len(statement.body) != 1 or statement.orelse or not self.is_.looks(statement.test, v):
            return None
        only = statement.body[0]
        finish = self._finish(only, v) if target_of(only) == v else None
        if finish is not None:
            done = ast.Assign([ast.Name(v, ast.Store())], helper("computed", ast.Name(v, ast.Load())))
            ast.copy_location(done, statement)
            chain.edits.append(lambda: block.insert(block.index(statement) + 1, done))
        return finish

    def _link(self, chain: _Chain, block: list[ast.stmt], j: int) -> bool:
        """Whether the statement adds to the pending v or hands it on; then the chain knows how to rewrite it."""
        statement, v = block[j], chain.v
        if _loads(statement, v) > 1:
            return False
        within = statement
        if isinstance(statement, ast.If) and len(statement.body) == 1 and not statement.orelse:
            within = statement.body[0]
            if not self.is_.looks(statement.test, v) or target_of(within) != v:
                return False
        if self._passes(within, v):
            chain.edits.append(lambda: _pass_through(within))
            return True
        if chain.added:
            return False
        if isinstance(statement, ast.If):
            block, j, statement = statement.body, 0, within
        if isinstance(statement, ast.AugAssign) and isinstance(statement.op, ast.Add) and _is(statement.target, v):
            called = self.is_.quiet(statement.value, v)
            call = helper("add", helper("plus_in_place").func, ast.Name(v, ast.Load()), statement.value)
        elif isinstance(statement, ast.Assign | ast.Expr) and (target_of(statement) or _adds_in_place(statement.value)):
            found = self.is_.sum_of(statement.value, v)
            call, called = (None, None) if found is None else (found.call, found.between)
        else:
            return False
        if call is None or called is None:
            return False
        edited = ast.copy_location(ast.Assign([ast.Name(target_of(statement) or v, ast.Store())], call), statement)
        self._written[edited] = self._written[statement]
        chain.edits.append(lambda: block.__setitem__(j, edited))
        chain.between += called
        chain.added = True
        return True

    def _passes(self, statement: ast.stmt, v: str) -> bool:
        """Whether it is `w = self.m(v)` where m is an Identity, or nothing at all under the condition of an `if`."""
        value = statement.value if isinstance(statement, ast.Assign) and target_of(statement) else None
        return (
            isinstance(value, ast.Call)
            and self.is_.role(value.func) in (IDENTITY, ABSENT)
            and len(value.args) == 1
            and not value.keywords
            and _is(value.args[0], v)
        )

    def _quiet_statement(self, statement: ast.stmt) -> list[str] | None:
        """The modules called by a statement that only sets variables, by harmless modules; None for any other."""
        if isinstance(statement, ast.Pass):
            return []
        if isinstance(statement, ast.If) and self.is_.looks(statement.test, None):
            parts = [self._quiet_statement(s) for s in (*statement.body, *statement.orelse)]
            return None if None in parts else [path for part in parts if part for path in part]
        if isinstance(statement, ast.Assign | ast.AnnAssign) and target_of(statement):
            return self.is_.quiet(statement.value, None)
        return None

    def _dead(self, v: str, chain: list[ast.stmt]) -> bool:
        """Whether the chain has all that the whole function reads of v."""
        return _loads(self.definition, v) == sum(_loads(s, v) for s in chain)

    def _stands_between(self, chain: _Chain, statement: ast.stmt, rest: list[ast.stmt], v: str, why: str = "") -> None:
        if not chain.named:
            # Of a module that ends in a batch norm nobody expects it, unless nothing else waits for the same addition.
            parts = self.is_.parts(getattr(statement, "value", None) or statement)
            others = [part for part in parts if not _is(part, v)]
            if len(others) == 1 < len(parts) and isinstance(others[0], ast.Call) and not self.is_.starts(others[0]):
                w = target_of(statement)
                if w and self.is_.quiet(others[0], v) is None and self._activated_in(rest[1:], w):
                    self._leave(statement, "what is added runs after the batch norm and may change what it reads")
            return
        if any(isinstance(n, ast.Attribute) and n.attr == "add_relu" for n in ast.walk(statement)):
            self._leave(statement, "add_relu may observe the sum, as for quantization")
        elif (
            isinstance(statement, ast.AugAssign) and isinstance(statement.target, ast.Name) and _is(statement.value, v)
        ):
            self._adds_into(statement, rest[1:])
        elif self._activated_in(rest, v):
            self._leave(statement, why or "this is between a batch norm and its activation, and may need its output")

    def _adds_into(self, statement: ast.AugAssign, rest: list[ast.stmt]) -> None:
        if isinstance(statement.target, ast.Name) and self._activated_in(rest, statement.target.id):
            self._leave(statement, "the sum is written into the other summand")

    def _activated_in(self, rest: list[ast.stmt], v: str) -> bool:
        """Whether v goes into an activation, alone or in a sum, before it gets another value."""
        for statement in rest:
            for node in scope(statement):
                value = self.is_.activated(node)
                if value is not None and any(_is(part, v) for part in [value, *self.is_.parts(value)]):
                    return True
            value = getattr(statement, "value", None)
            links = isinstance(statement, ast.AugAssign) and isinstance(statement.op, ast.Add)
            links = links or self._passes(statement, v) or (value and any(_is(n, v) for n in self.is_.parts(value)))
            # What an if sets, it may not set.
            surely = not isinstance(statement, ast.If)
            if surely and not links and any(_is(n, v) and isinstance(n.ctx, ast.Store) for n in scope(statement)):
                return False
        return False


def _is(node: ast.AST | None, name: str) -> TypeGuard[ast.Name]:
    return isinstance(node, ast.Name) and node.id == name


def _loads(node: ast.AST, name: str) -> int:
    """How often the value of the name is asked for, as `name += ...` does too."""
    nodes = list(ast.walk(node))
    names = (n for n in nodes if _is(n, name) and not isinstance(n.ctx, ast.Store))
    return sum(1 for _ in names) + sum(isinstance(n, ast.AugAssign) and _is(n.target, name) for n in nodes)


def _adds_in_place(value: ast.expr) -> bool:
    return isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute) and value.func.attr == "add_"


def _pass_through(statement: ast.stmt) -> None:
    assert isinstance(statement, ast.Assign)
    assert isinstance(statement.value, ast.Call)
    become(statement.value, helper("through", statement.value.func, *statement.value.args))


def _replace(finish: ast.Call, value: ast.expr, other: ast.expr) -> None:
    """Put the other expression in the place of the activation's input."""
    if finish.args and finish.args[0] is value:
        finish.args[0] = other
    elif isinstance(finish.func, ast.Attribute):
        finish.func.value = other
