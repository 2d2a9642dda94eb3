"""Where in a method's source a batch norm may wait for the addition and the activation after it.

It waits inside one expression, `act(self.bn(x) + y)`, and over statements of one block:

    v = self.bn(x);   identity = self.shortcut(y);   v += identity;   v = act(v)

where nothing runs in between but what `patterns` calls quiet, and nobody else reads v. Only calls are changed, to those
of `calls`; the statements, their order and every condition stay as they were written.
"""

from __future__ import annotations

import ast
from functools import partial
from typing import NamedTuple

from .chains import Chain, begin, loads, quiet_statement
from .patterns import LAYER, Patterns
from .reasons import ADDED_AFTER, ELSEWHERE, Reasons
from .syntax import become, computes, helper, is_name, mentions, path_of, target_of

_TWICE = "more than one thing is added before the activation"
_BLOCKS = (ast.If, ast.For, ast.AsyncFor, ast.While)


class Fused(NamedTuple):
    """The paths of what is one operation; the activation's name where it is a function or a method."""

    layer: str
    added: bool
    activation: str

    def __str__(self) -> str:
        return " + ".join([self.layer, *["add"] * self.added, self.activation])


class Rewriter:
    """Rewrites one definition in place; then `fused` says what was fused, and `reasons` what was not and why."""

    def __init__(self, definition: ast.FunctionDef, self_name: str, roles: dict[str, str], local: set[str]) -> None:
        self.definition, self.local = definition, local
        self.is_ = Patterns(self_name, roles, definition)
        self.reasons = Reasons(definition, self.is_)
        self.fused: list[Fused] = []
        self._begun: set[ast.stmt] = set()
        statements = [n for n in ast.walk(definition) if isinstance(n, ast.stmt)]
        # Statements first: they are judged as they were written.
        self._block(definition.body, True, [])
        for statement in statements:
            self._expressions(statement)
        ast.fix_missing_locations(definition)

    def gives_its_input(self) -> bool:
        """Whether the first argument goes into an activation that is not fused with a batch norm in here."""
        arguments = [*self.definition.args.posonlyargs, *self.definition.args.args][1:2]
        uses = [use for a in arguments for use in self.reasons.uses(self.definition.body, a.arg)]
        return any(isinstance(use, ast.Call) for use in uses)

    def returns_by_a_method(self, methods: dict[str, Rewriter]) -> bool:
        """Whether it returns self.method(...), and that what a batch norm of its own, or in an argument here, made."""
        for value in (n.value for n in ast.walk(self.definition) if isinstance(n, ast.Return)):
            method = methods.get(path_of(value.func, self.is_.self) or "") if isinstance(value, ast.Call) else None
            if method is None or not isinstance(value, ast.Call):
                continue
            names = [a.arg for a in (*method.definition.args.posonlyargs, *method.definition.args.args)][1:]
            made = [n for n, a in zip(names, value.args, strict=False) if self.is_.starts(a) or self.is_.returns(a)]
            uses = (use for name in made for use in method.reasons.uses(method.definition.body, name))
            if method.reasons.returns or any(isinstance(use, ast.Return) for use in uses):
                return True
        return False

    def _fuse(self, start: ast.Call, added: bool, finish: ast.Call, between: list[str]) -> None:
        """Rewrite the first call and the last."""
        activation = path_of(finish.func, self.is_.self) or ast.unparse(finish.func).split(".")[-1]
        name = ast.unparse(start.func)
        layer = path_of(start.func, self.is_.self) or self.is_.loops.get(name, name)
        self.fused.append(Fused(layer, added, activation))
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
                inner = self.is_.given(node)
                if self.is_.starts(inner) or self.is_.returns(inner):
                    self.reasons.leave(statement, ELSEWHERE, node, expected=False)
                continue
            found, parts = self.is_.sum_of(value, None), self.is_.parts(value)
            if isinstance(value, ast.Call) and self.is_.starts(value):
                self._fuse(value, False, node, [])
            elif found is not None and isinstance(found.start, ast.Call):
                start = found.start
                _replace(node, value, found.call)
                self._fuse(start, True, node, found.between)
            elif any(self.is_.starts(n) for n in parts):
                self.reasons.leave(statement, ADDED_AFTER if len(parts) == 2 else _TWICE, node)
            elif self.is_.returns(value) or any(self.is_.returns(n) for n in parts):
                self.reasons.leave(statement, ELSEWHERE, node, expected=False)

    # Over statements.

    def _block(self, block: list[ast.stmt], fuses: bool, after: list[ast.stmt]) -> None:
        for i, statement in enumerate(block):
            if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                if any(self.is_.starts(n) for s in ast.walk(statement) for n in [getattr(s, "value", None)]):
                    self.reasons.leave(statement, "statements of a function inside a function are not looked into")
                continue
            rest = [*block[i + 1 :], *after]
            chain = None if statement in self._begun else begin(self.is_, statement)
            if chain is not None:
                chain.fuses = fuses
                chain.expected = self.is_.role(chain.start.func) == LAYER
                self._begun.add(chain.first)
                self._follow(chain, block, i, after)
                if isinstance(statement, ast.If):
                    continue  # it has been looked into
            elif statement not in self._begun:
                self._is_not_begun(statement, rest)
            # What handles an exception may read a variable before it has its value.
            inside = fuses and isinstance(statement, _BLOCKS)
            for name in ("body", "orelse", "finalbody"):
                self._block(getattr(statement, name, []), inside, rest)
            for part in (*getattr(statement, "handlers", ()), *getattr(statement, "cases", ())):
                self._block(part.body, False, rest)

    def _is_not_begun(self, statement: ast.stmt, rest: list[ast.stmt]) -> None:
        """Say why what a batch norm returns does not wait here, if it does not."""
        value, v = getattr(statement, "value", None), target_of(statement)
        summands = [value] if value is None else self.is_.parts(value) or [value]
        if isinstance(statement, ast.AugAssign) and self.is_.starts(value):
            self.reasons.adds_into(statement, rest)
        elif any(self.is_.starts(n) or self.is_.returns(n) for n in summands):
            here = any(self.is_.starts(n) for n in summands)
            why = (ADDED_AFTER if len(summands) == 2 else _TWICE) if here else ELSEWHERE
            if isinstance(statement, ast.Return):
                self.reasons.returns = True
            elif v is not None:
                self.reasons.blame(statement, why, rest, v, expected=False)

    def _follow(self, chain: Chain, block: list[ast.stmt], i: int, after: list[ast.stmt]) -> None:
        """Rewrite the block from the chain's first statement to act(v), or say what is in the way, or neither."""
        for j in range(i + 1, len(block)):
            statement, v, rest = block[j], chain.v, [*block[j:], *after]
            if not mentions(statement, v):
                called = quiet_statement(self.is_, statement)
                if called is None:
                    self.reasons.stands_between(statement, rest, v, expected=chain.expected)
                    return
                chain.between += called
                continue
            w = target_of(statement)
            in_place = isinstance(statement, ast.Expr) and _adds_in_place(statement.value)
            ends = isinstance(statement, ast.Return | ast.If) or in_place or w == v
            if not ends and not self._dead(v, block[i + 1 : j + 1]):
                self.reasons.stands_between(statement, rest, v, "its output is used again", chain.expected)
                return
            if isinstance(statement, ast.If) and self.is_.taken(statement) == []:
                chain.edits.append(partial(statement.body.insert, 0, computes(v, statement)))
                continue  # should it run after all
            finish = self._finish(statement, v)
            if finish is None and isinstance(statement, ast.If):
                finish = self._finish_if(chain, statement, block)
            if finish is not None:
                self._end(chain, finish)
                return
            if not self._link(chain, block, j):
                adds = chain.added and any(is_name(n, v) for n in self.is_.parts(getattr(statement, "value", None)))
                self.reasons.stands_between(statement, rest, v, _TWICE if adds else "", chain.expected)
                return
            chain.v = w or v
            if chain.v not in self.local:
                break
        self.reasons.blame(chain.first, "the block ends before the activation", after, chain.v, chain.expected)

    def _end(self, chain: Chain, finish: ast.Call) -> None:
        value = self.is_.activated(finish)
        last = None if value is None else self.is_.sum_of(value, chain.v)
        if not chain.fuses:
            self.reasons.leave(chain.first, "inside a with, try or match statement")
        elif target_of(chain.first) not in self.local:
            self.reasons.leave(chain.first, "another function sees the variable")
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
        else:
            self.reasons.leave(chain.first, _TWICE, finish)

    def _finish(self, statement: ast.stmt, v: str) -> ast.Call | None:
        """act(v) in `w = ... act(v) ...` or `return ... act(v) ...`, v's only mention."""
        if not isinstance(statement, ast.Assign | ast.Return) or statement.value is None:
            return None
        if loads(statement, v) != 1 or (isinstance(statement, ast.Assign) and len(statement.targets) != 1):
            return None
        return self.is_.finish_in(statement.value, v)

    def _finish_if(self, chain: Chain, statement: ast.If, block: list[ast.stmt]) -> ast.Call | None:
        """act(v) in `if ...: v = act(v)`, after which v is computed in any case."""
        v = chain.v
        if len(statement.body) != 1 or statement.orelse or not self.is_.looks(statement.test, v):
            return None
        only = statement.body[0]
        finish = self._finish(only, v) if target_of(only) == v else None
        if finish is not None:
            chain.edits.append(lambda: block.insert(block.index(statement) + 1, computes(v, statement)))
        return finish

    def _link(self, chain: Chain, block: list[ast.stmt], j: int) -> bool:
        """Whether the statement adds to the pending v or hands it on; then the chain knows how to rewrite it."""
        statement, v = block[j], chain.v
        if loads(statement, v) > 1:
            return False
        within = statement
        if isinstance(statement, ast.If) and len(statement.body) == 1 and not statement.orelse:
            within = statement.body[0]
            if not self.is_.looks(statement.test, v) or target_of(within) != v:
                return False
        if self.is_.passes(within, v):
            chain.edits.append(lambda: _pass_through(within))
            return True
        if chain.added:
            return False
        if isinstance(statement, ast.If):
            block, j, statement = statement.body, 0, within
        if isinstance(statement, ast.AugAssign) and isinstance(statement.op, ast.Add) and is_name(statement.target, v):
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
        self.reasons.stands_for(edited, statement)
        chain.edits.append(lambda: block.__setitem__(j, edited))
        chain.between += called
        chain.added = True
        return True

    def _dead(self, v: str, chain: list[ast.stmt]) -> bool:
        """Whether the chain has all that the whole function reads of v."""
        return loads(self.definition, v) == sum(loads(s, v) for s in chain)


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
