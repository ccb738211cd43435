"""Raise stacked experts: two products of rows with their experts' weights -> ``moe_experts``.

    rows = x[choice's token];  h = act(rows @ gate_e) * (rows @ up_e);  y = sum_k w * (h @ down_e)

Rows come sorted by expert (Hugging Face's ``grouped_mm``: sort, histc, cumsum, two grouped
products, the inverse permutation) or in the choices' order (``batched_mm``: weights gathered for
every row). Gate and up are halves or alternating columns of one product; weights may be transposed,
products have biases, gate and up bounds; there may be no gate; a norm may follow the experts; rows
of other ranks' experts may be masked. The eager loop over experts becomes the first form before it
is traced (`dspark_compile.capture_experts`).

Conditions: what lies between the products is one of the dialect's activations, by value
(`expert_gate`); rows are gathered and put back as said, with nothing else reading them.

Worth: decode reads the experts that are hit, once; ``batched_mm`` copies them first, three times
the traffic, and ``grouped_mm`` sorts for one token.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from dspark_compile.passes.base import Match, Pass, PassContext, Problem, dialect
from dspark_compile.passes.expert_gate import recognise
from dspark_compile.passes.graph import (
    VIEWS,
    aten,
    emit,
    is_op,
    known_equal,
    module_path,
    peel,
    same_shape,
    shape,
    val,
)
from dspark_compile.passes.moe_combine import combine_of, scaled
from dspark_compile.passes.moe_rows import (
    Miss,
    RowProduct,
    columns,
    is_sentinel,
    row_bias,
    row_product,
    tokens_of,
)
from dspark_compile.passes.pointwise import pointwise_before


class RaiseMoEExperts(Pass):
    """See the module's docstring."""

    name = "raise_moe_experts"
    kind = "experts"
    stage = "raise"

    def pattern(self, graph: fx.Graph, ctx: PassContext) -> Iterator[Match]:
        for node in list(graph.nodes):
            if node.op != "call_function" or not node.users:
                continue
            try:
                down = row_product(node)
            except Miss as miss:
                yield Match(node, captures={"miss": miss})
                continue
            if down is None:
                continue
            try:
                found = self._find(down)
            except Miss as miss:
                yield Match(node, captures={"miss": miss})
                continue
            if found is not None:
                yield Match(node, captures=found)

    def _find(self, down: RowProduct) -> dict[str, Any] | None:
        """The parts of an experts block that ends in ``down``; None if ``down`` begins one."""
        experts = shape(down.weight)[0]

        def up_product(node: fx.Node) -> tuple[RowProduct, fx.Node | None] | None:
            """A product of the same order, with its bias."""
            node = _unmasked(node, down, experts)
            bias = None
            if is_op(node, aten.add.Tensor) and node.kwargs.get("alpha", 1) == 1:
                for a, b in (node.args, node.args[::-1]):
                    bias = row_bias(b, down.order) if isinstance(b, fx.Node) else None
                    if bias is not None and isinstance(a, fx.Node):
                        node = _unmasked(a, down, experts)
                        break
            product = row_product(node)
            if product is None or not _same_order(product, down):
                return None
            return product, bias

        inner = _unmasked(peel(down.rows), down, experts)
        program = pointwise_before(inner, lambda n: up_product(n) is not None)
        bases: dict[fx.Node, tuple[RowProduct, fx.Node | None]] = {}
        halves: list[tuple[fx.Node, torch.Tensor]] = []
        try:
            for leaf in program.leaves:
                base, which = columns(leaf, lambda n: up_product(n) is not None)
                bases[base] = up_product(base)  # type: ignore[assignment]
                halves.append((base, which))
        except Miss:
            if _feeds_product(down.result):
                return None  # the first product of a block, found again at its second
            raise
        if not halves or (not program.nodes and len(halves) < 2):
            return None
        combine = combine_of(down, experts)
        k = combine.choices
        activation = recognise(program)
        if activation is None:
            raise Miss("the experts compute no activation of the dialect's", program.root)
        rows = {id(p.rows): p.rows for p, _ in bases.values()}
        if len(rows) != 1:
            raise Miss("gate and up have different inputs", program.root)
        plain, weights = scaled(next(iter(rows.values())), down, combine)
        x, _ = tokens_of(plain, down.order, k)
        return {
            "down": down, "combine": combine, "k": k, "activation": activation, "x": x,
            "halves": halves, "bases": bases, "weights": weights,
        }  # fmt: skip

    def check(self, match: Match, ctx: PassContext) -> Problem | None:
        miss: Miss | None = match.captures.get("miss")
        return None if miss is None else Problem(miss.condition, miss.hint, miss.node)

    def rewrite(self, match: Match, graph: fx.Graph, ctx: PassContext) -> None:
        down, combine = match["down"], match["combine"]
        node = combine.result
        graph.inserting_before(node)

        def make(target: Any, *args: Any) -> fx.Node:
            return emit(graph, target, args, like=match.anchor, fake_mode=ctx.fake_mode)

        def stacked(product: RowProduct) -> fx.Node:
            if not product.turned:
                return product.weight
            return make(aten.permute.default, product.weight, [0, 2, 1])

        def part(tensor: fx.Node, which: torch.Tensor) -> fx.Node:
            size = shape(tensor)[1]
            start, step = int(which[0]), int(which[1] - which[0]) if len(which) > 1 else 1
            if len(which) == size and step == 1:
                return tensor
            stop = min(start + step * len(which), int(size))
            more = () if step == 1 else (step,)
            return make(aten.slice.Tensor, tensor, 1, start, stop, *more)

        sides = []
        for base, which in match["halves"]:
            product, bias = match["bases"][base]
            sides.append((part(stacked(product), which), bias and part(bias, which)))
        activation = match["activation"]
        gate = sides[activation.gate] if activation.gate is not None else None
        up = sides[-1 if gate is None else 1 - activation.gate]
        x, k = match["x"], match["k"]
        rows = shape(x)[0]
        if val(x).dim() == 3 and known_equal(shape(x)[1], 1):
            x = make(aten.view.default, x, [-1, int(shape(x)[2])])
        if val(x).dim() != 2:
            raise AssertionError("the tokens are no rows")
        choices = as_rows(down.order.choices, rows, k, make)
        weights = as_rows(match["weights"], rows, k, make)
        norm, eps = (None, 0.0) if combine.norm is None else combine.norm.args[1:3]
        new = make(
            dialect("moe_experts"), x, choices, weights,
            [gate[0]] if gate else [], [up[0]], [stacked(down)],
            [gate[1]] if gate and gate[1] else [], [up[1]] if up[1] else [],
            [combine.bias] if combine.bias else [],
            activation.activation, list(activation.limits), combine.weights is None, norm, eps,
            module_path(match.anchor),
        )  # fmt: skip
        result = new
        if val(node).dtype != val(new).dtype:
            result = emit(
                graph, aten._to_copy.default, (new,), {"dtype": val(node).dtype},
                like=node, fake_mode=ctx.fake_mode,
            )  # fmt: skip
        if combine.base is not None:
            result = make(aten.add.Tensor, combine.base, result)
        node.replace_all_uses_with(result)
        ctx.raised("experts", new)


def as_rows(node: fx.Node, rows: Any, k: Any, make: Any) -> fx.Node:
    """Flat choices as ``[T, k]``: what they were flattened from, or a view."""
    base = node
    while is_op(base, *VIEWS, aten.unsqueeze.default, aten.squeeze.dim):
        base = base.args[0]  # type: ignore[assignment]
        if same_shape(shape(base), (rows, k)):
            return base
    if same_shape(shape(node), (rows, k)):
        return node
    return make(aten.view.default, node, [rows, k])


def _same_order(a: RowProduct, b: RowProduct) -> bool:
    return a.order.choices is b.order.choices and a.order.permutation is b.order.permutation


def _unmasked(node: fx.Node, down: RowProduct, experts: Any) -> fx.Node:
    """``node`` without a mask of other ranks' rows, which are left out altogether, and without
    what an in-place addition to a view leaves behind."""
    while True:
        if is_op(node, aten.masked_fill.Scalar):
            if not is_sentinel(node.args[1], down.order, experts):
                return node
        elif not (
            is_op(node, aten.squeeze.dim)
            and is_op(node.args[0], aten.unsqueeze.default)
            and same_shape(shape(node), shape(node.args[0].args[0]))  # type: ignore[union-attr,arg-type]
        ):
            return node
        else:
            node = node.args[0]  # type: ignore[assignment]
        node = peel(node.args[0])


def _feeds_product(node: fx.Node, depth: int = 12) -> bool:
    """Whether another product of rows follows within a few nodes."""
    frontier, seen = [node], {node}
    for _ in range(depth):
        following = []
        for item in frontier:
            for user in item.users:
                if user in seen:
                    continue
                seen.add(user)
                try:
                    if row_product(user) is not None and user is not node:
                        return True
                except Miss:
                    return False
                following.append(user)
        frontier = following
    return False
