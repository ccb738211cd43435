"""Repeat-KV: attention reads grouped key/value heads directly.

Code for grouped-query attention copies each key/value head for every query head of its
group before attention (``repeat_kv``, ``repeat_interleave``, ``expand``). The dialect's
attention knows groups, so the copies go: ``G`` times less K/V traffic.

    key = view(expand(unsqueeze(k, d + 1), G), heads * G)     -> k
    key = expand(k, heads) of a single head                    -> k
    key = repeat(k, [1, G, 1, 1]) of a single head             -> k

A permutation between the copy and attention is carried over. Both key and value must be
copied by the same factor; tiling (``repeat``) of several heads maps query heads otherwise
than grouping does and stays.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import fx

from dspark_compile.passes.base import Match, Pass, PassContext, Problem
from dspark_compile.passes.graph import (
    VIEWS,
    aten,
    emit,
    is_dialect_op,
    is_op,
    known_equal,
    shape,
)


def _permuted(node: fx.Node) -> tuple[fx.Node, list[int] | None]:
    if is_op(node, aten.permute.default):
        return node.args[0], list(node.args[1])  # type: ignore[arg-type,return-value]
    return node, None


def _source(node: fx.Node, head_dim: int) -> tuple[fx.Node, Any] | None:
    """``(tensor before the copy, its number of heads)`` if ``node`` copies heads of
    dimension ``head_dim``."""
    if is_op(node, aten.expand.default):
        before = node.args[0]
        assert isinstance(before, fx.Node)
        a, b = shape(before), shape(node)
        if len(a) == len(b) and known_equal(a[head_dim], 1):
            rest = [i for i in range(len(b)) if i != head_dim]
            if all(known_equal(a[i], b[i]) for i in rest):
                return before, 1
        return None
    if is_op(node, aten.repeat.default):
        before = node.args[0]
        assert isinstance(before, fx.Node)
        times = list(node.args[1])  # type: ignore[arg-type]
        if len(times) == len(shape(before)) and known_equal(shape(before)[head_dim], 1):
            if all(t == 1 for i, t in enumerate(times) if i != head_dim):
                return before, 1
        return None
    if not is_op(node, *VIEWS):
        return None
    expanded = node.args[0]
    if not is_op(expanded, aten.expand.default):
        return None
    assert isinstance(expanded, fx.Node)
    lifted = expanded.args[0]
    assert isinstance(lifted, fx.Node)
    a, b, out = shape(lifted), shape(expanded), shape(node)
    group = head_dim + 1
    if len(a) != len(b) or len(b) != len(out) + 1 or not known_equal(a[group], 1):
        return None
    if not all(known_equal(a[i], b[i]) for i in range(len(b)) if i != group):
        return None
    merged = [*b[:head_dim], b[head_dim] * b[group], *b[group + 1 :]]
    if not all(known_equal(x, y) for x, y in zip(merged, out, strict=True)):
        return None
    if is_op(lifted, aten.unsqueeze.default):
        dim = int(lifted.args[1]) % len(a)  # type: ignore[arg-type]
        if dim == group:
            return lifted.args[0], a[head_dim]  # type: ignore[return-value]
    return lifted, a[head_dim]


class RepeatKV(Pass):
    """See the module's docstring."""

    name = "repeat_kv"
    kind = "attention"
    stage = "raise"

    def pattern(self, graph: fx.Graph, ctx: PassContext) -> Iterator[Match]:
        for node in list(graph.nodes):
            if not is_dialect_op(node, "attention"):
                continue
            found = {}
            for index, name in ((1, "key"), (2, "value")):
                inner, perm = _permuted(node.args[index])
                copied = _source(inner, perm[1] if perm else 1)
                if copied is not None:
                    found[name] = (copied[0], copied[1], perm)
            if found:
                yield Match(node, captures=found)

    def check(self, match: Match, ctx: PassContext) -> Problem | None:
        key, value = match.captures.get("key"), match.captures.get("value")
        if key is None or value is None:
            return Problem(
                f"only the {'key' if key else 'value'} heads are repeated",
                "repeat both or neither",
            )
        if not known_equal(key[1], value[1]):
            return Problem("key and value heads are repeated by different factors")
        heads = shape(match.anchor.args[0])[1]  # type: ignore[arg-type]
        if not (isinstance(heads, int) and isinstance(key[1], int) and heads % key[1] == 0):
            return Problem("the number of heads is not a known multiple")
        return None

    def rewrite(self, match: Match, graph: fx.Graph, ctx: PassContext) -> None:
        node = match.anchor
        args = list(node.args)
        with graph.inserting_before(node):
            for index, name in ((1, "key"), (2, "value")):
                before, heads, perm = match[name]
                source = before
                rank = len(shape(before))
                if rank == 5:
                    # The group dimension was made by a view; fold it away.
                    out = shape(node.args[index])  # type: ignore[arg-type]
                    order = perm or [0, 1, 2, 3]
                    sizes = [0] * 4
                    for position, dim in enumerate(order):
                        sizes[dim] = heads if position == 1 else out[position]
                    source = emit(
                        graph,
                        aten.view.default,
                        (before, sizes),
                        like=node,
                        fake_mode=ctx.fake_mode,
                    )
                if perm is not None:
                    source = emit(
                        graph,
                        aten.permute.default,
                        (source, perm),
                        like=node,
                        fake_mode=ctx.fake_mode,
                    )
                args[index] = source
        node.args = tuple(args)
