"""A loop's source as a function that makes its steps: see `dspark_compile.loops.source`."""

from __future__ import annotations

import ast
import types
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .names import NotALoop, mentions
from .source import LoopSource

REPEAT = "__dspark_repeat"


@dataclass(frozen=True)
class StepFunction:
    """``function(repeat, *values of arguments)`` gives the values of ``results``.

    ``repeat(step, carried) -> (carried, last, made)`` runs the loop: ``step`` takes what is carried
    and gives what is carried on, what is read of the last step, and for each list what is appended.

    Attributes:
        code, arguments, results: of the function.
        text: its source, for people.
    """

    code: types.CodeType
    arguments: tuple[str, ...]
    results: tuple[str, ...]
    text: str


def step_function(
    loop: LoopSource,
    data: Iterable[str],
    fixed: Iterable[str],
    known: Iterable[str],
    stride: int,
) -> StepFunction:
    """The function. The loop's variable, where the body reads it, is an argument like those that
    are carried.

    Args:
        data: names that are tensors or numbers before the loop begins: carried if they may be.
        fixed: carried names that are other objects: they must stay the same ones.
        known: names that have a value before the loop begins.
        stride: of the range.

    Raises:
        NotALoop: a name is read that has no value.
    """
    known = set(known)
    missing = sorted((loop.carried | loop.appended | set(loop.grown)) - known)
    if missing:
        raise NotALoop(f"{missing[0]} may have no value when the loop begins")
    fixed = sorted(fixed)
    carried = sorted(set(data) & loop.carried)
    body_reads_number = bool(mentions(loop.variable, loop.node.body))
    numbered = [loop.variable] if body_reads_number else []
    last = sorted(n for n in loop.stored & loop.after - loop.carried if n not in loop.grown)
    lists = [*sorted(loop.appended), *sorted(loop.grown)]
    outer = sorted({*loop.read & known, *carried, *fixed, *lists, *numbered})

    head = [f"{n} = []" for n in lists] + [f"{n} = __in_{n}" for n in fixed]
    check = [
        f"if {n} is not __in_{n}: raise RuntimeError({n + ' is another object after a step'!r})"
        for n in fixed
    ]
    tail = [
        *check,
        f"return ({_tuple([*(f'{n} + {stride}' for n in numbered), *carried])}, {_tuple(last)}, "
        f"{_tuple(f'tuple({n})' for n in lists)})",
    ]
    step = _parse(f"def step({', '.join(numbered + carried)}): pass")
    renamed = {n: f"__in_{n}" for n in (*lists, *fixed)}
    step.body = [
        *_parse_all(head),
        *(_Grow(loop.grown).visit(_copy(s)) for s in loop.node.body),
        *_parse_all(tail),
    ]
    outer_names = [renamed.get(n, n) for n in outer]
    made = [f"__made_{n}" for n in lists]
    skip = ["__dspark_number"] if numbered else []
    after = [
        f"({_tuple(skip + carried)}, {_tuple(last)}, {_tuple(made)}) = "
        f"{REPEAT}(step, {_tuple(numbered + carried)})"
    ]
    for n in lists:
        after += _collect(n, loop)
    results = [*carried, *last]
    function = _parse(f"def loop({', '.join([REPEAT, *outer_names])}): pass")
    function.body = [step, *_parse_all(after)]
    for n in sorted(loop.grown):
        grow = _copy(loop.grown[n])
        grow.value.args[0].elts = [
            ast.Name(f"__in_{n}", ast.Load()),
            ast.Starred(ast.Name(f"__parts_{n}", ast.Load()), ast.Load()),
        ]
        function.body.append(grow)
        results.append(n)
    function.body += _parse_all([f"return {_tuple(results)}"])
    line = loop.node.lineno
    for node in ast.walk(function):
        if "lineno" in getattr(node, "_attributes", ()) and not hasattr(node, "_of_user"):
            node.lineno = node.end_lineno = line  # type: ignore[attr-defined]
            node.col_offset = node.end_col_offset = 0  # type: ignore[attr-defined]
    module = ast.Module([function], [])
    compiled = compile(module, loop.filename, "exec")
    (code,) = (c for c in compiled.co_consts if isinstance(c, types.CodeType))
    return StepFunction(code, tuple(outer), tuple(results), ast.unparse(function))


def _collect(name: str, loop: LoopSource) -> list[str]:
    """What a list gets of the tensors ``[steps, ...]`` that were made for it.

    If all that is done with the list is joining it, one tensor stands for all: a list of as many
    tensors as steps takes Dynamo longer than the step.
    """
    parts = f"__parts_{name}"
    joined = loop.joined.get(name)
    one = f"__made_{name}[0].unbind(0)"
    if joined is not None:
        at = f"({ast.unparse(joined)}) % (__made_{name}[0].dim() - 1)"
        one = f"[__made_{name}[0].movedim(0, {at}).flatten({at}, {at} + 1)]"
    lines = [
        f"{parts} = []",
        # One append a step is the rule; several come back step by step.
        f"if len(__made_{name}) == 1: {parts}.extend({one})\n"
        f"else:\n"
        f"    for __step in zip(*[__x.unbind(0) for __x in __made_{name}]): {parts}.extend(__step)",
    ]
    return [*lines, f"__in_{name}.extend({parts})"] if name in loop.appended else lines


def _tuple(names: Iterable[str]) -> str:
    return "(" + "".join(f"{n}, " for n in names) + ")"


def _parse(text: str) -> Any:
    return ast.parse(text).body[0]


def _parse_all(lines: Iterable[str]) -> list[ast.stmt]:
    return [s for line in lines for s in ast.parse(line).body]


def _copy(node: ast.AST) -> Any:
    """A copy that keeps its own line numbers."""
    import copy

    new = copy.deepcopy(node)
    for n in ast.walk(new):
        n._of_user = True  # type: ignore[attr-defined]
    return new


class _Grow(ast.NodeTransformer):
    """``x = torch.cat([x, new], dim)`` → ``x.append(new)``."""

    def __init__(self, grown: dict[str, ast.Assign]) -> None:
        self.grown = {(s.lineno, s.col_offset) for s in grown.values()}

    def visit_Assign(self, node: ast.Assign) -> Any:
        if (node.lineno, node.col_offset) not in self.grown:
            return node
        (name,) = (t.id for t in node.targets)  # type: ignore[attr-defined]
        call = _parse(f"{name}.append(None)")
        for n in ast.walk(call):
            ast.copy_location(n, node)
            n._of_user = True  # type: ignore[attr-defined]
        call.value.args = [node.value.args[0].elts[1]]  # type: ignore[attr-defined]
        return call
