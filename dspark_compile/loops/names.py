"""Which names a block of Python assigns, reads first, and leaves to be read behind it."""

from __future__ import annotations

import ast
import types
from collections.abc import Iterable
from typing import Any

SCOPES = frozenset({"locals", "eval", "exec", "vars", "super", "globals"})


class NotALoop(Exception):
    """A loop's source cannot be made a step; the message says why."""


def inside(body: Iterable[ast.stmt]) -> Iterable[ast.AST]:
    """Every node of a block."""
    for statement in body:
        yield from ast.walk(statement)


def mentions(name: str, body: Iterable[ast.AST]) -> list[ast.Name]:
    """Where a block reads or assigns ``name``."""
    return [n for b in body for n in ast.walk(b) if isinstance(n, ast.Name) and n.id == name]


class Flow:
    """Which names a block assigns for certain, and which it reads before."""

    def __init__(self) -> None:
        self.assigned: set[str] = set()
        self.stored: set[str] = set()
        self.loads: set[str] = set()
        self.early: set[str] = set()

    def block(self, body: list[ast.stmt]) -> None:
        names = {
            n.id for n in inside(body) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
        } - _comprehended(body)
        self.stored |= names
        for statement in body:
            self._statement(statement)

    def _load(self, node: ast.AST | None, local: frozenset[str] = frozenset()) -> None:
        if node is None:
            return
        if isinstance(node, ast.Name):
            if isinstance(node.ctx, ast.Load) and node.id not in local:
                self.loads.add(node.id)
                if node.id in self.stored and node.id not in self.assigned:
                    self.early.add(node.id)
            return
        if isinstance(node, (ast.ListComp, ast.SetComp, ast.GeneratorExp, ast.DictComp)):
            targets = {
                n.id for g in node.generators for n in ast.walk(g.target) if isinstance(n, ast.Name)
            }
            local = local | targets
        for child in ast.iter_child_nodes(node):
            self._load(child, local)

    def _store(self, target: ast.expr) -> None:
        if isinstance(target, ast.Name):
            self.assigned.add(target.id)
        elif isinstance(target, (ast.Tuple, ast.List)):
            for item in target.elts:
                self._store(item)
        elif isinstance(target, ast.Starred):
            self._store(target.value)
        else:
            self._load(target)

    def _statement(self, node: ast.stmt) -> None:
        if isinstance(node, ast.Assign):
            self._load(node.value)
            for target in node.targets:
                self._store(target)
        elif isinstance(node, ast.AnnAssign):
            self._load(node.value)
            if node.value is not None:
                self._store(node.target)
        elif isinstance(node, ast.AugAssign):
            if isinstance(node.target, ast.Name):
                name = node.target
                self._load(ast.Name(name.id, ast.Load()))
            else:
                self._load(node.target)
            self._load(node.value)
            self._store(node.target)
        elif isinstance(node, ast.If):
            self._load(node.test)
            before = set(self.assigned)
            self._block(node.body)
            then, self.assigned = self.assigned, before
            self._block(node.orelse)
            self.assigned &= then
        elif isinstance(node, (ast.For, ast.While)):
            before = set(self.assigned)
            if isinstance(node, ast.For):
                self._load(node.iter)
                self._store(node.target)
            else:
                self._load(node.test)
            self._block(node.body)
            self.assigned = before
            self._block(node.orelse)
        elif isinstance(node, ast.With):
            for item in node.items:
                self._load(item.context_expr)
                if item.optional_vars is not None:
                    self._store(item.optional_vars)
            self._block(node.body)
        elif isinstance(node, (ast.Expr, ast.Assert, ast.Raise, ast.Pass)):
            self._load(node)
        elif isinstance(node, (ast.Break, ast.Continue)):
            pass
        else:
            raise NotALoop(f"it has a {type(node).__name__.lower()} statement")

    def _block(self, body: list[ast.stmt]) -> None:
        for statement in body:
            self._statement(statement)


def _comprehended(body: Iterable[ast.stmt]) -> set[str]:
    """Names that are only the variables of comprehensions."""
    variable_only: set[str] = set()
    elsewhere: set[str] = set()
    variables = {
        id(n)
        for node in inside(body)
        if isinstance(node, ast.comprehension)
        for n in ast.walk(node.target)
    }
    for n in inside(body):
        if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store):
            (variable_only if id(n) in variables else elsewhere).add(n.id)
    return variable_only - elsewhere


def read_after(loop: ast.For, function: Any, code: types.CodeType) -> set[str]:
    """Names that may be read once the loop has ended, closures' included."""
    end = (loop.end_lineno or 0, loop.end_col_offset or 0)
    own = {id(n) for n in ast.walk(loop)}
    enclosed = any(
        isinstance(n, (ast.For, ast.While)) and n is not loop and id(loop) in map(id, ast.walk(n))
        for n in ast.walk(function)
    )
    names = set(code.co_cellvars)
    for n in ast.walk(function):
        if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Store):
            if enclosed or (id(n) not in own and (n.lineno, n.col_offset) >= end):
                names.add(n.id)
        if isinstance(n, ast.AugAssign) and isinstance(n.target, ast.Name) and id(n) not in own:
            names.add(n.target.id)
        if isinstance(n, ast.Name) and n.id in SCOPES - {"super"}:
            raise NotALoop(f"its function calls {n.id}")
    return names
