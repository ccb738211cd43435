"""Repeat-KV: attention reads grouped key/value heads directly.

Code for grouped-query attention copies each key/value head for every query head of its
group before attention (``repeat_kv``, ``repeat_interleave``, ``expand``). The dialect's
attention knows groups, so the copies go: ``G`` times less K/V traffic.

    key = view(expand(unsqueeze(k, d + 1), G), heads * G)     -> k
    key = expand(k, heads) of a single head                    -> k
    key = repeat(k, [1, G, 1, 1]) of a single head             -> k

Permutations, rotations and norms between the copy and attention are carried over to the
tensor before it: they treat every head alike, so they come to the same on fewer heads
(Falcon copies its key heads before it rotates them). Both key and value must be copied by the
same factor; tiling (``repeat``) of several heads maps query heads otherwise than grouping does
and stays.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Copied:
    """Heads that were copied on their way to attention.

    Attributes:
        node: the copy.
        before: what was copied.
        dim: the dimension of the heads there.
        heads: how many they were.
        steps: what stands between the copy and attention, the last first.
    """

    node: fx.Node
    before: fx.Node
    dim: int
    heads: Any
    steps: tuple[fx.Node, ...]


def _copied(node: fx.Node) -> Copied | None:
    """The copy of heads (dimension 1) that ``node`` comes from."""
    dim = 1
    steps: list[fx.Node] = []
    while True:
        found = _source(node, dim)
        if found is not None:
            return Copied(node, found[0], dim, found[1], tuple(steps))
        if is_op(node, aten.permute.default):
            dim = int(list(node.args[1])[dim]) % len(shape(node))  # type: ignore[arg-type]
        elif not _same_for_every_head(node, dim):
            return None
        steps.append(node)
        node = node.args[0]  # type: ignore[assignment]


def _same_for_every_head(node: fx.Node, dim: int) -> bool:
    """Whether ``node`` is a rotation or a norm that does the same to every head of its input."""
    if is_dialect_op(node, "rope"):
        others = node.args[1:3]
    elif is_dialect_op(node, "rms_norm", "layer_norm"):
        others = tuple(a for a in node.args[1:] if isinstance(a, fx.Node))
    else:
        return False
    x, out = shape(node.args[0]), shape(node)  # type: ignore[arg-type]
    if len(x) != len(out) or dim == len(out) - 1 or not known_equal(x[dim], out[dim]):
        return False
    return all(_alike(shape(other), dim - len(out)) for other in others)  # type: ignore[arg-type]


def _alike(sizes: tuple[Any, ...], dim: int) -> bool:
    """Whether a tensor that broadcasts is the same along ``dim``, counted from the end."""
    return len(sizes) < -dim or known_equal(sizes[dim], 1)


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
                copied = _copied(node.args[index])  # type: ignore[arg-type]
                if copied is not None:
                    found[name] = copied
            if found:
                yield Match(node, captures=found)

    def check(self, match: Match, ctx: PassContext) -> Problem | None:
        key, value = match.captures.get("key"), match.captures.get("value")
        if key is None or value is None:
            return Problem(
                f"only the {'key' if key else 'value'} heads are repeated",
                "repeat both or neither",
            )
        if not known_equal(key.heads, value.heads):
            return Problem("key and value heads are repeated by different factors")
        heads = shape(match.anchor.args[0])[1]  # type: ignore[arg-type]
        if not (isinstance(heads, int) and isinstance(key.heads, int) and heads % key.heads == 0):
            return Problem("the number of heads is not a known multiple")
        return None

    def rewrite(self, match: Match, graph: fx.Graph, ctx: PassContext) -> None:
        node = match.anchor
        args = list(node.args)
        for index, name in ((1, "key"), (2, "value")):
            copied: Copied = match[name]
            source = copied.before
            for target, rest, kwargs, like in _replay(copied):
                with graph.inserting_before(node):
                    source = emit(
                        graph, target, (source, *rest), kwargs, like=like, fake_mode=ctx.fake_mode
                    )
                if is_dialect_op(like):
                    ctx.moved(like, source)
            args[index] = source
        node.args = tuple(args)


def _replay(copied: Copied) -> Iterator[tuple[Any, tuple[Any, ...], dict[str, Any], fx.Node]]:
    """The calls that lead from before the copy to attention."""
    if len(shape(copied.before)) == 5:
        # The group dimension was made by a view; fold it away.
        sizes = list(copied.node.args[1])  # type: ignore[arg-type]
        sizes[copied.dim] = copied.heads
        yield aten.view.default, (sizes,), {}, copied.node
    for step in reversed(copied.steps):
        yield step.target, step.args[1:], dict(step.kwargs), step
