"""Repeat-KV: attention reads grouped key/value heads directly.

Code for grouped-query attention copies each key/value head for every query head of its
group before attention (``repeat_kv``, ``repeat_interleave``, ``expand``). The dialect's
attention knows groups, so the copies go: ``G`` times less K/V traffic.

    key = view(expand(unsqueeze(k, d + 1), G), heads * G)     -> k
    key = expand(k, heads) of a single head                    -> k
    key = repeat(k, [1, G, 1, 1]) of a single head             -> k
    key = repeat(k, [1, R, 1, 1]) or cat([k] * R, 1)           -> k, query heads in another order

Of several heads, ``repeat`` gives query head h the head h % H in place of h // G (JetMoE). Then the
query's heads are put into the order of the groups, and those of the result back: some numbers for
each new token, where the copy is of all that are past. It is not done where a mask or sinks tell
heads apart.

Permutations, rotations and norms between the copy and attention are carried over to the
tensor before it: they treat every head alike, so they come to the same on fewer heads
(Falcon copies its key heads before it rotates them). Both key and value must be copied in the same
way, by the same factor.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx

from dspark_compile.passes.base import Match, Pass, PassContext, Problem
from dspark_compile.passes.graph import (
    VIEWS,
    argument,
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
        tiled: whether the heads as a whole are repeated, not each of them.
    """

    node: fx.Node
    before: fx.Node
    dim: int
    heads: Any
    steps: tuple[fx.Node, ...]
    tiled: bool = False


def _copied(node: fx.Node) -> Copied | None:
    """The copy of heads (dimension 1) that ``node`` comes from."""
    dim = 1
    steps: list[fx.Node] = []
    while True:
        found = _source(node, dim)
        if found is not None:
            return Copied(node, found[0], dim, found[1], tuple(steps))
        tiled = _tiled(node, dim)
        if tiled is not None:
            return Copied(node, tiled, dim, shape(tiled)[dim], tuple(steps), tiled=True)
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


def _tiled(node: fx.Node, head_dim: int) -> fx.Node | None:
    """What ``node`` repeats as a whole along ``head_dim``."""
    if is_op(node, aten.repeat.default):
        before = node.args[0]
        times = list(node.args[1])  # type: ignore[arg-type]
        if len(times) != len(shape(before)):  # type: ignore[arg-type]
            return None
        rest = all(t == 1 for i, t in enumerate(times) if i != head_dim)
        return before if rest and isinstance(times[head_dim], int) else None  # type: ignore[return-value]
    if is_op(node, aten.cat.default):
        parts = list(node.args[0])  # type: ignore[arg-type]
        dim = int(argument(node, 1, "dim", 0)) % len(shape(node))
        if dim == head_dim and len(parts) > 1 and all(p is parts[0] for p in parts):
            return parts[0]
    return None


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
        if key.tiled != value.tiled:
            return Problem("key and value heads are repeated in different ways")
        if key.tiled:
            bias, sinks = (argument(match.anchor, i, n) for i, n in ((3, "bias"), (4, "sinks")))
            told = bias is not None and not _alike(shape(bias), -3)
            if told or sinks is not None:
                what = "sinks tell" if sinks is not None else "the mask tells"
                return Problem(
                    f"heads are repeated as a whole, and {what} them apart",
                    "repeat each head (repeat_interleave)",
                )
            if match.anchor.kwargs.get("mask"):
                return Problem("heads are repeated as a whole behind a printed mask")
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
        if not match["key"].tiled:
            node.args = tuple(args)
            return
        heads, copied = match["key"].heads, shape(match["key"].node)[match["key"].dim]
        times, rest = copied // heads, shape(node.args[0])[1] // copied  # type: ignore[arg-type]
        # In front of what does the same to every head, so that rotation stays beside attention.
        query, steps = args[0], []
        while len(query.users) == 1 and _same_for_every_head(query, 1):  # type: ignore[union-attr,arg-type]
            steps.append(query)
            query = query.args[0]  # type: ignore[union-attr]
        with graph.inserting_before(node):
            args[0] = _turned(query, times, heads, rest, ctx)  # type: ignore[arg-type]
            for step in reversed(steps):
                args[0] = emit(
                    graph, step.target, (args[0], *step.args[1:]), dict(step.kwargs), like=step,
                    fake_mode=ctx.fake_mode,
                )  # fmt: skip
                ctx.moved(step, args[0])
        node.args = tuple(args)
        users = list(node.users)
        with graph.inserting_before(node.next):
            result = _turned(node, heads, times, rest, ctx)
        for user in users:
            user.replace_input_with(node, result)


def _turned(x: fx.Node, outer: int, inner: int, rest: int, ctx: PassContext) -> fx.Node:
    """``x [B, outer * inner * rest, M, D]`` with outer and inner changing places."""

    def make(target: Any, *args: Any) -> fx.Node:
        return emit(x.graph, target, args, like=x, fake_mode=ctx.fake_mode)

    batch, heads, rows, features = (
        n if isinstance(n, int) else make(aten.sym_size.int, x, i) for i, n in enumerate(shape(x))
    )
    parts = make(aten.view.default, x, [batch, outer, inner, rest, rows, features])
    parts = make(aten.permute.default, parts, [0, 2, 1, 3, 4, 5])
    return make(aten.view.default, parts, [batch, heads, rows, features])


def _replay(copied: Copied) -> Iterator[tuple[Any, tuple[Any, ...], dict[str, Any], fx.Node]]:
    """The calls that lead from before the copy to attention."""
    if len(shape(copied.before)) == 5:
        # The group dimension was made by a view; fold it away.
        sizes = list(copied.node.args[1])  # type: ignore[arg-type]
        sizes[copied.dim] = copied.heads
        yield aten.view.default, (sizes,), {}, copied.node
    for step in reversed(copied.steps):
        yield step.target, step.args[1:], dict(step.kwargs), step
