"""The source of a loop, as a function that makes one step of it.

``for _ in range(n): body`` inside of a function is read from its source file. What the names in it
are (tensors, numbers, other objects, lists that the body appends to) is known to who traces, and
`dspark_compile.loops.step.step_function` writes a function accordingly::

    def loop(repeat, model, cache, tok, out):
        def step(tok):
            out = []
            logits = model(tok, past_key_values=cache).logits
            tok = logits[:, -1:].argmax(-1)
            out.append(tok)
            return ((tok,), (), (tuple(out),))
        ((tok,), (), (out_made,)) = repeat(step, (tok,))
        ...

The body is the user's own syntax tree with its own line numbers. Nothing here looks at values:
whether steps are equal is for the tracer to find out.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
import types
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from .names import SCOPES, Flow, NotALoop, inside, mentions, read_after

# In place of a loop's variable that the body assigns before it reads it.
UNREAD = "__dspark_unread"
# What Dynamo calls the rest of a function behind a graph break.
_RESUMED = re.compile(r"torch_dynamo_resume_in_(.*)_at_\d+")


@dataclass(frozen=True)
class LoopSource:
    """One ``for`` statement.

    Attributes:
        node: the statement.
        filename: of the source.
        where: ``file.py:12 in f: for _ in range(n):``.
        variable: of the loop; `UNREAD` where its name is only one of the body's.
        stored: names that the body assigns.
        carried: those that it may read before it assigns them, or may not assign at all.
        read: names that it only reads, globals among them.
        after: names that are read behind the loop.
        appended: names that the body does nothing with but call ``append``.
        grown: names that the body does nothing with but ``x = torch.cat([x, new], dim)``, and that
            statement.
        joined: of lists and grown names, the dimension that ``torch.cat`` joins them in, where
            nothing else is done with them.
        indexed: names and attributes that the loop's number selects from, as text.
        calls: whether it calls anything but ``append`` of a list.
    """

    node: ast.For
    filename: str
    where: str
    variable: str
    stored: frozenset[str]
    carried: frozenset[str]
    read: frozenset[str]
    after: frozenset[str]
    appended: frozenset[str]
    grown: dict[str, ast.Assign] = field(default_factory=dict)
    joined: dict[str, ast.expr] = field(default_factory=dict)
    indexed: frozenset[str] = frozenset()
    calls: bool = True

    @property
    def names(self) -> frozenset[str]:
        """Every name in the body."""
        return self.stored | self.read


def find_loop(code: types.CodeType, line: int, column: int | None = None) -> LoopSource | None:
    """The ``for … in range(…)`` statement of ``code`` that stands on ``line``.

    None: there is no source, or no such statement.

    Raises:
        NotALoop: it is one, but not a step repeated.
    """
    try:
        lines, first = inspect.getsourcelines(code)
        tree = ast.parse(textwrap.dedent("".join(lines)))
    except OSError:
        raise NotALoop("its source is not available") from None
    except (TypeError, SyntaxError):
        return None
    ast.increment_lineno(tree, first - 1)
    indent = len(lines[0]) - len(lines[0].lstrip()) if lines else 0
    function = _function(tree, code)
    if function is None:
        return None
    # The instruction stands for the whole statement, from Python 3.12 on for its iterable.
    loops = [
        n
        for n in ast.walk(function)
        if isinstance(n, ast.For)
        and line in (n.lineno, n.iter.lineno)
        and (column is None or column in (n.col_offset + indent, n.iter.col_offset + indent))
    ]
    loops = [n for n in loops if _is_range(n.iter)]
    if len(loops) != 1:
        return None
    (loop,) = loops
    file = code.co_filename.rsplit("/", 1)[-1]
    text = lines[loop.lineno - first].strip()
    where = f"{file}:{loop.lineno} in {code.co_name}: {text}"
    return _analyse(loop, function, code, where)


def _function(tree: ast.Module, code: types.CodeType) -> Any:
    """The definition that ``code`` was compiled from; decorators come before its line."""
    name = _RESUMED.sub(r"\1", code.co_name)
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name == name:
            top = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            if code.co_firstlineno in (node.lineno, top):
                return node
    return None


def _is_range(node: ast.expr) -> bool:
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "range"
        and not node.keywords
    )


_FORBIDDEN: dict[type, str] = {
    ast.Return: "it returns out of the loop",
    ast.Yield: "it yields",
    ast.YieldFrom: "it yields",
    ast.Await: "it awaits",
    ast.Global: "it declares globals",
    ast.Nonlocal: "it declares nonlocals",
    ast.Delete: "it deletes names",
    ast.Try: "it catches exceptions",
    ast.FunctionDef: "it defines a function",
    ast.AsyncFunctionDef: "it defines a function",
    ast.ClassDef: "it defines a class",
    ast.Lambda: "it has a lambda",
    ast.NamedExpr: "it assigns inside of an expression",
    ast.Import: "it imports",
    ast.ImportFrom: "it imports",
}


def _analyse(loop: ast.For, function: Any, code: types.CodeType, where: str) -> LoopSource:
    if loop.orelse:
        raise NotALoop("it has an else branch")
    if not isinstance(loop.target, ast.Name):
        raise NotALoop("its variable is not one name")
    for node in inside(loop.body):
        reason = _FORBIDDEN.get(type(node))
        if reason is not None:
            raise NotALoop(reason)
        if isinstance(node, ast.Attribute) and _is_private(node.attr):
            raise NotALoop(f"it reads the private name {node.attr}")
        if isinstance(node, ast.Name) and (node.id in SCOPES or node.id.startswith("__dspark")):
            raise NotALoop(f"it uses {node.id}")
    _no_jumps(loop.body)
    variable = loop.target.id
    flow = Flow()
    flow.block(loop.body)
    if variable in flow.stored:
        if variable in flow.early or variable not in flow.assigned:
            raise NotALoop(f"it assigns its own variable {variable}")
        # As in ``v, _ = x.topk(k)`` under ``for _ in``: the name is one of the body's, and nobody
        # reads the number.
        variable = UNREAD
    after = read_after(loop, function, code)
    appended = {n for n in flow.loads if n not in flow.stored and _only_appended(n, loop.body)}
    grown = {n: s for n in flow.stored if (s := _growth(n, loop.body)) is not None}
    joined = {n: dim for n in appended if (dim := _joined(n, loop, function, code)) is not None}
    joined |= {n: _dimension(s.value) for n, s in grown.items()}  # type: ignore[arg-type]
    maybe = {n for n in flow.stored - flow.assigned if n in after}
    carried = (flow.early | maybe) - set(grown)
    return LoopSource(
        loop, code.co_filename, where, variable, frozenset(flow.stored), frozenset(carried),
        frozenset(flow.loads - flow.stored - {variable}), frozenset(after), frozenset(appended),
        grown, joined, frozenset(_indexed(variable, loop.body)),
        any(
            isinstance(n, ast.Call) and getattr(n.func, "attr", "") != "append"
            for n in inside(loop.body)
        ),
    )  # fmt: skip


def _is_private(name: str) -> bool:
    return name.startswith("__") and not name.endswith("__")


def _no_jumps(body: Iterable[ast.stmt]) -> None:
    """No ``break`` or ``continue`` of this loop."""
    for node in body:
        if isinstance(node, ast.Break):
            raise NotALoop("it may break off: torch.while_loop has a condition")
        if isinstance(node, ast.Continue):
            raise NotALoop("it has a continue")
        for name in ("body", "orelse", "finalbody"):
            if not (isinstance(node, (ast.For, ast.While)) and name == "body"):
                _no_jumps(getattr(node, name, ()))


def _only_appended(name: str, body: list[ast.stmt]) -> bool:
    calls = [
        n.value.func.value  # type: ignore[attr-defined]
        for n in inside(body)
        if isinstance(n, ast.Expr)
        and isinstance(n.value, ast.Call)
        and isinstance(n.value.func, ast.Attribute)
        and n.value.func.attr == "append"
        and isinstance(n.value.func.value, ast.Name)
        and n.value.func.value.id == name
    ]
    return bool(calls) and len(calls) == len(mentions(name, body))


def _growth(name: str, body: list[ast.stmt]) -> ast.Assign | None:
    """The statement ``name = torch.cat((name, new), dim)``, if it is all that the body does with
    ``name``."""
    for node in body:
        if (
            isinstance(node, ast.Assign)
            and len(node.targets) == 1
            and isinstance(node.targets[0], ast.Name)
            and node.targets[0].id == name
            and isinstance(node.value, ast.Call)
            and _is_cat(node.value)
            and isinstance(node.value.args[0], (ast.List, ast.Tuple))
            and len(node.value.args[0].elts) == 2
        ):
            first = node.value.args[0].elts[0]
            if isinstance(first, ast.Name) and first.id == name:
                if len(mentions(name, body)) == 2:
                    return node
    return None


def _is_cat(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in ("cat", "concat", "concatenate")
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "torch"
        and bool(node.args)
        and {k.arg for k in node.keywords} <= {"dim", "axis"}
    )


def _dimension(cat: ast.Call) -> ast.expr:
    if len(cat.args) > 1:
        return cat.args[1]
    return next((k.value for k in cat.keywords), ast.Constant(0))


def _joined(name: str, loop: ast.For, function: Any, code: types.CodeType) -> ast.expr | None:
    """The dimension in which a list is joined, if its function does nothing else with it."""
    if (
        name in code.co_cellvars
        or name in code.co_freevars
        or name in code.co_varnames[: _given(code)]
    ):
        return None
    own = {id(n) for n in ast.walk(loop)}
    reads = [
        n for n in mentions(name, [function])
        if id(n) not in own and isinstance(n.ctx, ast.Load)
    ]  # fmt: skip
    cats = [
        c
        for c in ast.walk(function)
        if _is_cat(c) and c.args[0] in reads  # type: ignore[attr-defined]
    ]
    if len(reads) != 1 or len(cats) != 1:
        return None
    dim = _dimension(cats[0])  # type: ignore[arg-type]
    return dim if isinstance(ast.literal_eval(dim) if _literal(dim) else None, int) else None


def _given(code: types.CodeType) -> int:
    """How many of a function's names are its arguments."""
    flags = bool(code.co_flags & inspect.CO_VARARGS) + bool(code.co_flags & inspect.CO_VARKEYWORDS)
    return code.co_argcount + code.co_kwonlyargcount + flags


def _literal(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) or (
        isinstance(node, ast.UnaryOp) and isinstance(node.operand, ast.Constant)
    )


def _indexed(variable: str, body: list[ast.stmt]) -> set[str]:
    return {
        ast.unparse(n.value)
        for n in inside(body)
        if isinstance(n, ast.Subscript) and mentions(variable, [n.slice])
    }
