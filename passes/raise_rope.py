"""Raise RoPE: rotary position embeddings, however they were written, become one dialect op.

    x * cos + rotate_half(x) * sin            half-split; also cat(x1 c - x2 s, x2 c + x1 s)
    x * cos + rotate_pairs(x) * sin           interleaved; stack + flatten, ::2 slices
    view_as_real(view_as_complex(x) * freqs)  complex (Llama 4, DeepSeek V2)
    cat(rotated(x[..., :R]), x[..., R:])      partial
    half-split out of interleaved pairs       DeepSeek V3: x is put in order first

The features are followed, not the spelling (``features.py``, ``rotation.py``): every output
feature must be ``+x[i] * cos[j] -/+ x[partner(i)] * sin[k]`` with the partners of one of the
two layouts. So a rotation the other way is seen as such (``sin`` is negated), and a wrong
sign, axis or half is never taken for a rotation. cos and sin are taken as they are, any scale
inside them, and at half width where both members of a pair share one column.

Conditions: x, cos and sin are one tensor each, the rotated features come first, and the
result has the shape of ``x`` broadcast against cos. Where a rotation does not begin the
features, only the rotated slice is replaced.

Worth: one pass over q and one over k in place of two to five, and q/k-norm + RoPE + append
as one kernel later.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from dspark_compile.passes.base import Match, Pass, PassContext, Problem, dialect
from dspark_compile.passes.features import Features
from dspark_compile.passes.graph import (
    VIEWS,
    argument,
    aten,
    dtype,
    emit,
    is_op,
    is_tensor,
    order,
    peel_casts,
    same_shape,
    shape,
    val,
)
from dspark_compile.passes.rotation import Columns, Rotation, match_rotation

_ANCHORS = (
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.cat.default,
    aten._to_copy.default,
    aten.clone.default,
    *VIEWS,
)


class RaiseRope(Pass):
    """See the module's docstring."""

    name = "raise_rope"
    kind = "rope"
    stage = "raise"

    def __init__(self) -> None:
        self.features = Features()
        self._made: dict[Any, fx.Node] = {}

    def pattern(self, graph: fx.Graph, ctx: PassContext) -> Iterator[Match]:
        matches: list[Match] = []
        taken: set[fx.Node] = set()
        reasons: dict[fx.Node, Problem] = {}
        for node in reversed(list(graph.nodes)):
            if node in taken or not node.users or not _may_end(node):
                continue
            found = self.rotation(node)
            if isinstance(found, Rotation):
                inside = _between(node, {found.x, found.cos.node, found.sin.node})
                taken |= inside
                matches.append(Match(node, list(inside), {"rotation": found}))
            elif found is not None:
                for inner in _between(node, set()):
                    reasons.setdefault(inner, found)
        position = order(graph)
        for node in graph.nodes:
            if node not in taken and is_seed(node):
                inside = {node} | {u for m in matches for u in m.nodes if m.anchor is node}
                if not inside & taken:
                    matches.append(Match(node, captures={"problem": _explain(node, reasons)}))
        yield from sorted(matches, key=lambda m: position[m.anchor])

    def rotation(self, node: fx.Node) -> Rotation | Problem | None:
        """What ``node`` rotates; why not, where it has products of the right kind."""
        if not is_tensor(node) or dtype(node).is_complex:
            return None
        value = self.features.products(node)
        if value is None or value[0].sign.ndim != 1 or not any(t.is_product for t in value):
            return None
        return match_rotation(value, self.features)

    def check(self, match: Match, ctx: PassContext) -> Problem | None:
        problem = match.captures.get("problem")
        if problem is not None:
            return problem
        node, rotation = match.anchor, match["rotation"]
        lead = val(node).shape[:-1]
        try:
            want = torch.broadcast_shapes(
                val(rotation.x).shape[:-1], _lead(rotation.cos), _lead(rotation.sin)
            )
        except RuntimeError:
            want = ()
        if not same_shape(lead, want):
            return Problem("cos and sin do not broadcast against x", "", node)
        if _lead_rank(rotation) > len(lead):
            return Problem("cos has more dimensions than x", "", node)
        wide = [n for n in match.nodes if is_tensor(n) and dtype(n) == torch.float64]
        if wide and dtype(rotation.x) != torch.float64:
            return Problem("it is computed in float64", "compute in float32 at most", wide[0])
        return None

    def rewrite(self, match: Match, graph: fx.Graph, ctx: PassContext) -> None:
        node, rotation = match.anchor, match["rotation"]
        graph.inserting_before(node)

        def make(target: Any, *args: Any) -> fx.Node:
            return emit(graph, target, args, like=node, fake_mode=ctx.fake_mode)

        x = rotation.x
        if rotation.offset or rotation.width != shape(x)[-1]:
            stop = rotation.offset + rotation.width
            x = _existing(x, rotation.offset, stop, 1, node) or make(
                aten.slice.Tensor, x, val(x).dim() - 1, rotation.offset, stop
            )
        if not rotation.ordered:
            x = _deinterleave(x, rotation.rotary_dim, make)
        cos, sin = (self._columns(c, graph, node, ctx) for c in (rotation.cos, rotation.sin))
        if rotation.clockwise:
            sin = self._after(sin, graph, ctx, aten.neg.default, sin)
        inner = [n for n in match.nodes if is_op(n, aten.mul.Tensor, aten.add.Tensor)]
        fp32 = (torch.float32, torch.complex64)
        wide = dtype(rotation.x).itemsize < 4 and any(dtype(n) in fp32 for n in inner)
        out_dtype = None if dtype(node) == dtype(x) else dtype(node)
        new = make(
            dialect("rope"), x, cos, sin, rotation.rotary_dim, rotation.interleaved, wide, out_dtype
        )
        node.replace_all_uses_with(new)
        ctx.raised("rope", new)

    def _columns(self, c: Columns, graph: fx.Graph, anchor: fx.Node, ctx: PassContext) -> fx.Node:
        node = c.node
        if c.part:
            pair = self._after(node, graph, ctx, aten.view_as_real.default, node)
            node = self._after(
                pair, graph, ctx, aten.select.int, pair, val(pair).dim() - 1, int(c.part == "im")
            )
        if (c.start, c.step) == (0, 1) and c.stop == shape(node)[-1]:
            return node
        found = _existing(node, c.start, c.stop, c.step, anchor)
        dim = val(node).dim() - 1
        step = () if c.step == 1 else (c.step,)
        return found or self._after(
            node, graph, ctx, aten.slice.Tensor, node, dim, c.start, c.stop, *step
        )

    def _after(
        self, at: fx.Node, graph: fx.Graph, ctx: PassContext, target: Any, *args: Any
    ) -> Any:
        """A call placed right after ``at``, made once."""
        key = (target, args)
        if key not in self._made:
            spot = at
            while spot.op == "placeholder" and spot.next.op == "placeholder":
                spot = spot.next
            with graph.inserting_after(spot):
                self._made[key] = emit(graph, target, args, like=at, fake_mode=ctx.fake_mode)
        return self._made[key]


def _may_end(node: fx.Node) -> bool:
    if not is_op(node, *_ANCHORS) or not is_tensor(node):
        return False
    if is_op(node, aten._to_copy.default, aten.clone.default, *VIEWS):
        below = peel_casts(node.args[0])
        while is_op(below, *VIEWS):
            below = peel_casts(below.args[0])
        return is_op(
            below,
            aten.add.Tensor, aten.sub.Tensor, aten.cat.default, aten.stack.default,
            aten.view_as_real.default,
        )  # fmt: skip
    return True


def is_seed(node: fx.Node) -> bool:
    """Whether a node is a mark of a rotation: ``cat`` or ``stack`` of two tensors of which
    one is negated, or a complex number made of pairs."""
    if is_op(node, aten.view_as_complex.default):
        return any(is_op(u, aten.mul.Tensor) for u in node.users)
    if not is_op(node, aten.cat.default, aten.stack.default):
        return False
    parts = node.args[0]
    if not isinstance(parts, (list, tuple)) or len(parts) != 2:
        return False
    negated = [is_op(p, aten.neg.default) for p in parts]
    if negated[0] == negated[1]:
        return _is_pair(parts)
    bare = [p.args[0] if n else p for p, n in zip(parts, negated, strict=True)]  # type: ignore[union-attr]
    pieces = (aten.slice.Tensor, aten.select.int)
    return all(is_op(p, *pieces) for p in bare) and bare[0].args[0] is bare[1].args[0]  # type: ignore[union-attr]


def _is_pair(parts: Any) -> bool:
    """``a*c - b*s`` beside ``b*c + a*s``."""
    kinds = [peel_casts(p) for p in parts]
    if not (is_op(kinds[0], aten.sub.Tensor) and is_op(kinds[1], aten.add.Tensor)):
        return False
    factors = [
        {f for product in k.args if is_op(product, aten.mul.Tensor) for f in product.args}
        for k in kinds
    ]
    return len(factors[0]) == 4 and factors[0] == factors[1]


def _explain(node: fx.Node, reasons: dict[fx.Node, Problem]) -> Problem:
    """The best reason known for a mark of a rotation that is in none."""
    rank = val(node).dim()
    dim = argument(node, 1, "dim", 0)
    if is_op(node, aten.cat.default) and int(dim) % rank != rank - 1:
        return Problem(f"the halves are joined along dimension {dim}, not the last", "", node)
    frontier = [node]
    for _ in range(6):
        for item in frontier:
            if item in reasons:
                found = reasons[item]
                return Problem(found.condition, found.hint, node)
        frontier = [u for item in frontier for u in item.users]
    return Problem(
        "the halves are not combined as x * cos + rotated * sin",
        "multiply by cos and sin and add in one expression",
        node,
    )


def _between(node: fx.Node, stop: set[fx.Node]) -> set[fx.Node]:
    """The nodes that compute ``node`` from ``stop``: the inside of a match."""
    inside: set[fx.Node] = set()
    stack = [(node, 0)]
    kinds = (
        *_ANCHORS,
        aten.mul.Tensor,
        aten.neg.default,
        aten.stack.default,
        aten.slice.Tensor,
        aten.select.int,
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.permute.default,
        aten.flip.default,
        aten.roll.default,
        aten.view_as_complex.default,
        aten.view_as_real.default,
    )
    while stack:
        item, depth = stack.pop()
        if item in inside or item in stop or depth > 14 or not is_op(item, *kinds):
            continue
        inside.add(item)
        stack += [(below, depth + 1) for below in item.all_input_nodes]
    return inside


def _lead(columns: Columns) -> torch.Size:
    return val(columns.node).shape[:-1]


def _lead_rank(rotation: Rotation) -> int:
    return max(len(_lead(rotation.cos)), len(_lead(rotation.sin)))


def _existing(x: fx.Node, start: int, stop: int, step: int, anchor: fx.Node) -> fx.Node | None:
    """A slice of the last dimension of ``x`` that is already there, before ``anchor``."""
    dim = val(x).dim() - 1
    args = (x, dim, start, stop) if step == 1 else (x, dim, start, stop, step)
    for user in x.users:
        if is_op(user, aten.slice.Tensor) and tuple(user.args) == args and user < anchor:
            return user
    return None


def _deinterleave(x: fx.Node, rotary: int, make: Any) -> fx.Node:
    """``x`` with the even features of the first ``rotary`` before the odd ones."""
    last, size = val(x).dim() - 1, shape(x)[-1]
    parts = [
        make(aten.slice.Tensor, x, last, 0, rotary, 2),
        make(aten.slice.Tensor, x, last, 1, rotary, 2),
    ]
    if size > rotary:
        parts.append(make(aten.slice.Tensor, x, last, rotary, size))
    return make(aten.cat.default, parts, last)
