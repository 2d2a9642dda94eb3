"""What an expression of a method is: a batch norm's call, an addition, an activation, or something harmless."""

from __future__ import annotations

import ast
from typing import NamedTuple

from . import calls
from .syntax import helper, is_name, looped, mentions, passing, path_of, plain, target_of

# What the attributes of a module are, by their path after `self.`: found when a model is converted.
LAYER, ACTIVATION, IDENTITY, HARMLESS, ABSENT = "layer", "activation", "identity", "harmless", "absent"
# A module that ends in a batch norm; the first is harmless too.
ENDS, ENDS_LOUDLY = "ends in a layer", "ends in a layer, loudly"
# A list of modules of which some end in one, but not the last; an attribute that is False.
SOME_END, FALSE = "some end in a layer", "false"
MODULE, PROPERTY, OTHER = "another module", "property", "other"
# What is added to a path for what is known of the module there.
GIVEN, RETURNS = " gives its input to an activation", " returns what a layer made, in a sum or not"
_QUIET = (LAYER, ENDS, IDENTITY, HARMLESS, ABSENT)
_STARTS = (LAYER, ENDS, ENDS_LOUDLY, SOME_END)
_FUNCTION_NAMES = {function.__name__ for function in calls.FUNCTIONS}
_LOOKS = (ast.BoolOp, ast.boolop, ast.UnaryOp, ast.Not, ast.Compare, ast.Is, ast.IsNot, ast.Constant)
_LOOKS += (ast.Attribute, ast.Name, ast.expr_context)


class Sum(NamedTuple):
    """An addition of something pending: its rewritten call, what runs while it is pending, the batch norm's call."""

    call: ast.Call
    between: list[str]
    start: ast.expr


class Patterns:
    """Recognizes expressions, knowing what the module is called and what its attributes are."""

    def __init__(self, self_name: str, roles: dict[str, str], definition: ast.FunctionDef) -> None:
        self.self, self.roles = self_name, roles
        self.loops = self._variables_of_loops(definition)
        self.aliases = self._aliases(definition)

    def role(self, node: ast.expr) -> str | None:
        """What self.a.b is; None for an expression of another form."""
        if isinstance(node, ast.Name):
            return self.roles.get((self.loops | self.aliases).get(node.id, "no path"))
        path = path_of(node, self.self)
        return None if path is None else self.roles.get(path, OTHER)

    def _variables_of_loops(self, definition: ast.FunctionDef) -> dict[str, str]:
        """The path, `bns[]`, of the variable in `for bn in self.bns`, zip and enumerate too, if it is that alone."""
        found: dict[str, str] = {}
        stored = [n.id for n in ast.walk(definition) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]

        def match(target: ast.expr, values: ast.expr) -> None:
            if isinstance(target, ast.Tuple) and (each := looped(values)) is not None:
                for one, of in zip(target.elts, each, strict=False):
                    match(one, of)
            path = found.get(values.id) if isinstance(values, ast.Name) else path_of(values, self.self)
            once = isinstance(target, ast.Name) and stored.count(target.id) == 1
            if isinstance(target, ast.Name) and once and path is not None and f"{path}[]" in self.roles:
                found[target.id] = f"{path}[]"

        for node in ast.walk(definition):  # outer loops first
            if isinstance(node, ast.For):
                match(node.target, node.iter)
        return found

    def _aliases(self, definition: ast.FunctionDef) -> dict[str, str]:
        """The path, `aa`, of a variable that nothing but `aa = getattr(self, "aa", None)` sets."""
        statements = [n for n in ast.walk(definition) if isinstance(n, ast.Assign)]
        found = {v: path for s in statements if (v := target_of(s)) and (path := self._got(s.value)) is not None}
        stored = [n.id for n in ast.walk(definition) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
        return {v: path for v, path in found.items() if stored.count(v) == 1}

    def _got(self, node: ast.expr) -> str | None:
        """`aa` for getattr(self, "aa", None)."""
        if not (isinstance(node, ast.Call) and is_name(node.func, "getattr") and len(node.args) == 3):
            return None
        owner, name, default = node.args
        path = name.value if isinstance(name, ast.Constant) and isinstance(name.value, str) else ""
        plain = is_name(owner, self.self) and isinstance(default, ast.Constant) and default.value is None
        return path if plain and self.roles.get(path, PROPERTY) != PROPERTY else None

    def is_alias(self, statement: ast.stmt) -> bool:
        """Whether it is `aa = getattr(self, "aa", None)`, which runs nothing."""
        return isinstance(statement, ast.Assign) and target_of(statement) in self.aliases

    def over_modules(self, values: ast.expr) -> bool:
        """Whether a loop over it gives modules of lists: going from one to the next runs nothing."""
        path = path_of(values, self.self)
        each = looped(values)
        return (path is not None and f"{path}[]" in self.roles) or (
            each is not None and all(isinstance(v, ast.Constant) or self.over_modules(v) for v in each)
        )

    def starts(self, node: ast.AST | None) -> bool:
        """Whether it is self.bn(x)."""
        return (
            isinstance(node, ast.Call)
            and self.role(node.func) in _STARTS
            and len(node.args) == 1
            and not isinstance(node.args[0], ast.Starred)
            and not node.keywords
        )

    def _given_to(self, node: ast.AST | None, what: str) -> ast.expr | None:
        """z, where the node is self.m(z) and this is known of m."""
        one = isinstance(node, ast.Call) and len(node.args) == 1 and not node.keywords
        path = path_of(node.func, self.self) if one and isinstance(node, ast.Call) else None
        return node.args[0] if isinstance(node, ast.Call) and f"{path}{what}" in self.roles else None

    def given(self, node: ast.AST) -> ast.expr | None:
        """z, where the node is self.m(z) and m gives z to an activation."""
        return self._given_to(node, GIVEN)

    def returns(self, node: ast.AST | None) -> bool:
        """Whether it is self.m(z) and m returns what a batch norm made, in a sum or not."""
        return self._given_to(node, RETURNS) is not None

    def activated(self, node: ast.AST) -> ast.expr | None:
        """z, where the node is act(z), with nothing but constants beside z, or z.relu()."""
        if not isinstance(node, ast.Call):
            return None
        function = node.func
        beside = [*node.args[1:], *(keyword.value for keyword in node.keywords)]
        if isinstance(function, ast.Attribute) and function.attr in calls.METHODS and not (node.args or node.keywords):
            return function.value
        role = self.role(function)
        name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", None)
        known = role == ACTIVATION or (role is None and name in _FUNCTION_NAMES and plain(function))
        constant = all(isinstance(a, ast.Constant) for a in beside) and all(k.arg for k in node.keywords)
        return node.args[0] if known and constant and node.args and not isinstance(node.args[0], ast.Starred) else None

    def summands(self, node: ast.AST | None) -> tuple[ast.expr, list[ast.expr]] | None:
        """The function of an addition, and its two summands."""
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return helper("plus").func, [node.left, node.right]
        if not isinstance(node, ast.Call) or node.keywords or any(isinstance(a, ast.Starred) for a in node.args):
            return None
        if ast.unparse(node.func) == "torch.add" and len(node.args) == 2:
            return node.func, node.args
        if isinstance(node.func, ast.Attribute) and node.func.attr in ("add", "add_") and len(node.args) == 1:
            name = "method" if node.func.attr == "add" else "method_in_place"
            return helper(name).func, [node.func.value, *node.args]
        return None

    def parts(self, node: ast.AST | None) -> list[ast.expr]:
        """All summands of an addition, of additions within it too; nothing of anything else."""
        summands = self.summands(node)
        return [] if summands is None else [each for part in summands[1] for each in self.parts(part) or [part]]

    def sum_of(self, node: ast.AST, pending: str | None) -> Sum | None:
        """pending + y or y + pending; where `pending` is None, a batch norm's call in its place."""
        parts = self.summands(node)
        if parts is None:
            return None
        function, (left, right) = parts
        for mine, other in ((left, right), (right, left)):
            if not (self.starts(mine) if pending is None else is_name(self.unwrapped(mine), pending)):
                continue
            if mine is right and ast.unparse(function).endswith("in_place"):
                continue  # changes the other one
            # What comes before the batch norm's call may be anything.
            between = [] if pending is None and mine is right else self.quiet(other, pending)
            if between is not None:
                parts = (passing(part) if part is mine and pending is not None else part for part in (left, right))
                return Sum(helper("add", function, *parts), between, mine)
        return None

    def quiet(self, node: ast.expr | None, pending: str | None) -> list[str] | None:
        """The modules it calls, if all it does is call harmless ones with names; else None."""
        if isinstance(node, ast.Constant):
            return []
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
            return self.quiet(node.value, pending)
        if isinstance(node, ast.Name):
            return None if node.id == pending else []
        if isinstance(node, ast.IfExp) and self.looks(node.test, pending):
            parts, called = [node.body, node.orelse], []
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            parts, called = [node.left, node.right], []
        elif isinstance(node, ast.Call) and not node.keywords and self.role(node.func) in _QUIET:
            parts, called = node.args, [path_of(node.func, self.self) or "[]"]
        else:
            return None
        for part in parts:
            more = self.quiet(part, pending)
            if more is None:
                return None
            called += more
        return None if any("[]" in path for path in called) else called

    def looks(self, test: ast.expr, pending: str | None) -> bool:
        """Whether a condition only looks at attributes and names, of which none is the pending one or a property."""
        nodes = list(ast.walk(test))
        runs = any(isinstance(n, ast.Attribute) and self.role(n) == PROPERTY for n in nodes)
        return all(isinstance(n, _LOOKS) for n in nodes) and not runs and not (pending and mentions(test, pending))

    def taken(self, statement: ast.If) -> list[ast.stmt] | None:
        """The block that runs if the module stays as it is, where an attribute decides alone; else None."""
        test = statement.test
        if isinstance(test, ast.Compare) and ast.unparse(test).endswith(" is not None") and len(test.ops) == 1:
            role = self.role(test.left)
            if role not in (None, ABSENT, PROPERTY, OTHER):
                return statement.body
            return statement.orelse if role == ABSENT else None
        return statement.orelse if self.role(test) in (FALSE, ABSENT) else None

    def unwrapped(self, node: ast.expr) -> ast.expr:
        """v, where the node is self.m(v) and m is an Identity, or of several; else the node."""
        while (
            isinstance(node, ast.Call)
            and self.role(node.func) == IDENTITY
            and len(node.args) == 1
            and not node.keywords
            and not isinstance(node.args[0], ast.Starred)
        ):
            node = node.args[0]
        return node

    def passes(self, statement: ast.stmt, v: str) -> bool:
        """Whether it is `w = self.m(v)` where m is an Identity, or nothing at all under the condition of an `if`."""
        value = statement.value if isinstance(statement, ast.Assign) and target_of(statement) else None
        return (
            isinstance(value, ast.Call)
            and self.role(value.func) in (IDENTITY, ABSENT)
            and len(value.args) == 1
            and not value.keywords
            and is_name(value.args[0], v)
        )

    def finish_in(self, node: ast.expr, pending: str) -> ast.Call | None:
        """The activation's call on the pending value, where nothing else in the expression runs before it."""
        value = self.activated(node)
        if isinstance(node, ast.Call) and value is not None:
            if isinstance(value, ast.Name) and value.id == pending:
                return node
            found = self.sum_of(value, pending)
            if found is not None:
                return node
        if isinstance(node, ast.Call):
            parts = [node.func, *node.args, *(keyword.value for keyword in node.keywords)]
        elif isinstance(node, ast.BinOp):
            parts = [node.left, node.right]
        elif isinstance(node, ast.Tuple | ast.List):
            parts = node.elts
        elif isinstance(node, ast.Attribute):
            parts = [node.value]
        else:
            return None
        for part in parts:
            if mentions(part, pending):
                return self.finish_in(part, pending)
            if not plain(part):
                return None
        return None
