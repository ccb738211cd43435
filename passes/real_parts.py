"""Real parts: complex numbers that are only read as pairs are made of two real tensors.

    view_as_real(polar(r, t)[...] * 2)   -> stack([r cos(t), r sin(t)], -1)[...] * 2
    select(view_as_real(c), -1, 0)       -> the real part of c, wherever c comes from

through views, indexing, sums, products and conjugation. Rotary tables are written so (Llama 4,
DeepSeek-V2, the original LLaMA), and no kernel takes complex numbers. A complex input, a table in
a buffer say, is read as pairs where it lies.

The arithmetic is that of complex numbers, operation by operation: products are
``(ac - bd, ad + bc)``. It runs behind `raise_rope`, which knows complex rotation as it is written.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import fx

from dspark_compile.passes.base import Match, Pass, PassContext
from dspark_compile.passes.graph import argument, aten, dtype, emit, is_op, is_tensor, shape
from dspark_compile.passes.normalize import escapes

# What treats both parts alike.
_SHAPES = frozenset(
    {
        aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.permute.default,
        aten.transpose.int, aten.t.default, aten.slice.Tensor, aten.select.int,
        aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.expand.default,
        aten.index_select.default, aten.index.Tensor, aten.clone.default, aten.alias.default,
        aten.detach.default, aten.lift_fresh_copy.default, aten.repeat.default, aten.roll.default,
        aten.flip.default, aten.neg.default, aten.embedding.default,
    }
)  # fmt: skip

Parts = tuple[fx.Node, fx.Node]


class RealParts(Pass):
    """See the module's docstring."""

    name = "real_parts"
    stage = "raise"

    def pattern(self, graph: fx.Graph, ctx: PassContext) -> Iterator[Match]:
        known: dict[fx.Node, Parts | None] = {}
        for node in list(graph.nodes):
            if not is_op(node, aten.view_as_real.default) or not node.users or escapes(node):
                continue
            source = node.args[0]
            if is_tensor(source) and source.op == "call_function":  # type: ignore[union-attr]
                yield Match(node, captures={"source": source, "known": known})

    def rewrite(self, match: Match, graph: fx.Graph, ctx: PassContext) -> None:
        node = match.anchor
        parts = _Parts(graph, ctx, match["known"]).of(match["source"])
        if parts is None:
            return
        last = len(shape(node)) - 1
        for user in list(node.users):
            if is_op(user, aten.select.int) and int(user.args[1]) % (last + 1) == last:  # type: ignore[arg-type]
                user.replace_all_uses_with(parts[int(user.args[2])])  # type: ignore[arg-type]
                graph.erase_node(user)
        if node.users:
            with graph.inserting_before(node):
                both = emit(graph, aten.stack.default, (list(parts), last), like=node,
                            fake_mode=ctx.fake_mode)  # fmt: skip
            node.replace_all_uses_with(both)
        graph.erase_node(node)


class _Parts:
    """Makes real and imaginary parts."""

    def __init__(
        self, graph: fx.Graph, ctx: PassContext, known: dict[fx.Node, Parts | None]
    ) -> None:
        self.graph, self.ctx, self.known = graph, ctx, known

    def of(self, node: Any) -> Parts | None:
        """The parts of a complex tensor, each of its shape; None: they cannot be made."""
        if node not in self.known:
            self.known[node] = self._of(node)
        return self.known[node]

    def _of(self, node: fx.Node) -> Parts | None:
        if not is_tensor(node):
            return None
        if not dtype(node).is_complex:
            return None
        if node.op != "call_function":
            inputs = [n for n in self.graph.nodes if n.op == "placeholder"]
            behind = inputs[-1] if node.op == "placeholder" else node
            with self.graph.inserting_after(behind):
                pairs = emit(self.graph, aten.view_as_real.default, (node,), like=node,
                             fake_mode=self.ctx.fake_mode)  # fmt: skip
            return self._pair(node, pairs, pairs.next)
        if is_op(node, aten.polar.default):
            return self._polar(node)
        if is_op(node, aten.complex.default):
            a, b = node.args
            alike = all(
                is_tensor(x) and tuple(shape(x)) == tuple(shape(node))  # type: ignore[arg-type]
                for x in (a, b)
            )
            return (a, b) if alike else None  # type: ignore[return-value]
        if is_op(node, aten.view_as_complex.default):
            return self._pair(node, node.args[0])
        if is_op(node, aten._conj.default, aten.conj_physical.default):
            inner = self.of(node.args[0])
            return inner and (inner[0], self.call(node, aten.neg.default, inner[1]))
        if node.target in _SHAPES:
            inner = self.of(node.args[0])
            return inner and tuple(self._again(node, x) for x in inner)  # type: ignore[return-value]
        if is_op(node, aten.cat.default, aten.stack.default):
            every = [self.of(x) for x in node.args[0]]  # type: ignore[union-attr]
            if None in every:
                return None
            return tuple(self._again(node, [x[i] for x in every]) for i in (0, 1))  # type: ignore[index,return-value]
        if is_op(node, aten.mul.Tensor):
            return self._product(node)
        if is_op(node, aten.div.Tensor):
            inner, by = self.of(node.args[0]), node.args[1]
            if inner is None or not _real(by):
                return None
            return tuple(self.call(node, aten.div.Tensor, x, by) for x in inner)  # type: ignore[return-value]
        if is_op(node, aten.add.Tensor, aten.sub.Tensor) and not node.kwargs:
            left, right = self.of(node.args[0]), self.of(node.args[1])
            if left is None or right is None:
                return None
            return tuple(self.call(node, node.target, x, y) for x, y in zip(left, right))  # type: ignore[return-value]
        return None

    def _polar(self, node: fx.Node) -> Parts | None:
        radius, angle = node.args
        made = [self.call(node, f, angle) for f in (aten.cos.default, aten.sin.default)]
        if not _ones(radius):
            made = [self.call(node, aten.mul.Tensor, radius, x) for x in made]
        if any(len(shape(x)) != len(shape(node)) for x in made):
            return None
        return made[0], made[1]

    def _product(self, node: fx.Node) -> Parts | None:
        a, b = node.args
        left = self.of(a) if isinstance(a, fx.Node) else None
        right = self.of(b) if isinstance(b, fx.Node) else None
        mul = aten.mul.Tensor
        if left is None or right is None:
            inner, by = (left, b) if left is not None else (right, a)
            if inner is None or not _real(by):
                return None
            return tuple(self.call(node, mul, x, by) for x in inner)  # type: ignore[return-value]
        ac, bd = (self.call(node, mul, left[i], right[i]) for i in (0, 1))
        ad, bc = (self.call(node, mul, left[i], right[1 - i]) for i in (0, 1))
        return (
            self.call(node, aten.sub.Tensor, ac, bd), self.call(node, aten.add.Tensor, ad, bc)
        )  # fmt: skip

    def _pair(self, node: fx.Node, pairs: Any, before: fx.Node | None = None) -> Parts:
        last = len(shape(pairs)) - 1
        return tuple(  # type: ignore[return-value]
            self.call(node, aten.select.int, pairs, last, i, before=before) for i in (0, 1)
        )

    def _again(self, node: fx.Node, first: Any) -> fx.Node:
        with self.graph.inserting_before(node):
            return emit(
                self.graph, node.target, (first, *node.args[1:]), dict(node.kwargs), like=node,  # type: ignore[arg-type]
                fake_mode=self.ctx.fake_mode,
            )  # fmt: skip

    def call(
        self, node: fx.Node, target: Any, *args: Any, before: fx.Node | None = None
    ) -> fx.Node:
        """A call in front of ``node``, or of ``before``."""
        with self.graph.inserting_before(before or node):
            return emit(self.graph, target, args, like=node, fake_mode=self.ctx.fake_mode)


def _real(x: Any) -> bool:
    """Whether ``x`` is a real number or tensor."""
    if isinstance(x, fx.Node):
        return is_tensor(x) and not dtype(x).is_complex
    return isinstance(x, (int, float))


def _ones(x: Any) -> bool:
    if is_op(x, aten.ones.default, aten.ones_like.default):
        return True
    return is_op(x, aten.full.default, aten.full_like.default) and argument(x, 1, "fill_value") == 1
