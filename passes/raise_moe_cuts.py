"""Raise experts that are given their part of rows sorted by expert -> grouped ops over all rows.

    order = choice.flatten().argsort();  sizes = bincount(choice.flatten()).tolist()
    parts = x[order // k].split(sizes)
    y = cat([F.linear(part, w[e]) for e, part in enumerate(parts)])       -> grouped_linear
    y = cat([expert[e](part) for e, part in enumerate(parts)])            -> moe_experts
    out.index_add_(0, token[start:end], expert[e](rows[start:end]) * weight[start:end, None])

The parts' sizes are data; they are proved to be the counts of the choices by which the rows are
sorted, and nothing of such a size is left (`expert_cuts`). Experts that are MLPs become one op
with the weights and the sum over the choices where those follow; grouped products are found again
by `raise_moe_experts`.

Conditions: the proof; the experts do the same thing with weights of one size, which are not
quantised.

Worth: one graph, where Dynamo has a break at every list of sizes, and one op for E.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from dspark_compile.passes import expert_loops
from dspark_compile.passes.base import Match, PassContext, Problem, dialect
from dspark_compile.passes.expert_cuts import Lift, Piece, piece, prove_cuts
from dspark_compile.passes.expert_loops import MarkedLoop, NotProved
from dspark_compile.passes.expert_steps import addition
from dspark_compile.passes.fuse_quantized_experts import kernel_for
from dspark_compile.passes.graph import (
    argument,
    aten,
    emit,
    fake_call,
    is_dialect_op,
    is_op,
    is_tensor,
    shape,
    val,
)
from dspark_compile.passes.moe_combine import combine_of, scaled
from dspark_compile.passes.moe_rows import Miss, Order, RowProduct, tokens_of
from dspark_compile.passes.raise_moe_experts import as_rows

_CAST = aten._to_copy.default


class RaiseMoECuts(expert_loops.LoopPass):
    """See the module's docstring."""

    name = "raise_moe_cuts"

    def pattern(self, graph: fx.Graph, ctx: PassContext) -> Iterator[Match]:
        if not any(is_op(n, aten._local_scalar_dense.default) for n in graph.nodes):
            return
        nodes = list(graph.nodes)
        sums = {n: found for n in nodes if (found := addition(n)) is not None}
        continued = {found[0] for found in sums.values()}
        for node in nodes:
            if node._erased:
                continue  # by the rewrite of a match before
            if is_op(node, aten.cat.default) and int(argument(node, 1, "dim", 0)) == 0:
                parts, places, base = list(node.args[0]), None, None  # type: ignore[call-overload]
            elif node in sums and node not in continued:
                chain: list[Any] = []
                base = node
                while base in sums:
                    chain.insert(0, sums[base])
                    base = chain[0][0]
                parts, places = [c[2] for c in chain], [c[1] for c in chain]
            else:
                continue
            pieces = [_piece_of(part) for part in parts]
            if len(parts) > 1 and any(p is not None for p in pieces):
                yield Match(
                    node,
                    captures={"parts": parts, "places": places, "base": base, "pieces": pieces},
                )

    def check(self, match: Match, ctx: PassContext) -> Problem | None:
        pieces: list[Piece | None] = match["pieces"]
        if any(p is None for p in pieces):
            return Problem("an expert's rows are no part of the sorted rows", "", match.anchor)
        values = {match.anchor, *match["parts"]}
        loops = [loop for loop in self.loops if values & set(loop.values)]
        try:
            sizes = _sizes(loops)
            match.captures["cuts"] = prove_cuts(pieces, sizes)  # type: ignore[arg-type]
        except NotProved as error:
            return Problem(str(error), "", match.anchor)
        match.captures["loops"] = loops
        return None

    def rewrite(self, match: Match, graph: fx.Graph, ctx: PassContext) -> None:
        node, cuts = match.anchor, match["cuts"]
        graph.inserting_before(node)
        made: list[fx.Node] = []

        def make(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
            made.append(emit(graph, target, args, kwargs, like=node, fake_mode=ctx.fake_mode))
            return made[-1]

        lift = Lift(cuts, make, kernel_for(ctx, val(node).device))
        try:
            result = lift(match["parts"])
            if match["places"] is not None:
                where = lift(match["places"])
                result = make(aten.index_add.default, match["base"], 0, where, result)
        except NotProved as error:
            for item in reversed(made):
                graph.erase_node(item)
            ctx.reject(self.name, self.kind, node, str(error), site=True)
            return
        node.replace_all_uses_with(result)
        for loop in match["loops"]:
            loop.proved |= {result, *match["parts"]}
        graph.erase_node(node)
        names = {n.name for n in lift.mlps}
        ctx.report.sites[:] = [s for s in ctx.report.sites if s.node not in names]
        _sized_again(graph, result, ctx)
        for new, rows in lift.experts:
            column: Any = new.args[1].args[0]  # type: ignore[union-attr]
            order = Order(column, cuts.flat, cuts.permutation)
            whole, old, summed = combined(graph, new, rows, order, ctx)
            ctx.raised("experts", whole)
            for loop in match["loops"]:
                loop.proved |= {summed} if old in loop.proved else set()
        sized = [n.args[0] for n in graph.nodes if is_op(n, aten._local_scalar_dense.default)]
        sized += [n for n in graph.nodes if is_tensor(n) and _of_data_size(n)]
        expert_loops.drop_checks(graph, sized)  # type: ignore[arg-type]


def _piece_of(part: Any) -> Piece | None:
    """The rows that an expert's part of the result is computed of."""
    seen: set[fx.Node] = set()
    todo = [part]
    while todo:
        node = todo.pop(0)
        if node in seen or not is_tensor(node) or not _of_data_size(node):
            continue
        seen.add(node)
        found = piece(node)
        if found is not None:
            return found
        todo += node.all_input_nodes
    return None


def _of_data_size(node: fx.Node) -> bool:
    return any(free_unbacked_symbols(n) for n in shape(node) if not isinstance(n, int))


def _sizes(loops: list[MarkedLoop]) -> dict[int, list[fx.Node]]:
    """Turn -> what its branches take for the size of its rows.

    Raises:
        NotProved: a branch asks for something else.
    """
    sizes: dict[int, list[fx.Node]] = {}
    for loop in loops:
        if loop.hit is not None:
            raise NotProved("the loop goes through the experts that are hit")
        for turn, marks in loop.skips.items():
            for mark in marks:
                if not is_dialect_op(mark, "expert_loop_skip_empty"):
                    raise NotProved("a branch depends on the data of an expert")
                if isinstance(mark.args[2], fx.Node):
                    sizes.setdefault(turn, []).append(mark.args[2])
    return sizes


def _sized_again(graph: fx.Graph, start: fx.Node, ctx: PassContext) -> None:
    """Shapes behind ``start`` that no longer depend on data."""
    behind = {start}
    for node in graph.nodes:
        if node in behind or not behind & set(node.all_input_nodes) or node.op != "call_function":
            continue
        value = node.meta.get("val")
        items = value if isinstance(value, (tuple, list)) else [value]
        if any(hasattr(x, "shape") and free_unbacked_symbols(x) for x in items):
            try:
                node.meta["val"] = fake_call(node.target, node.args, node.kwargs, ctx.fake_mode)
            except Exception:  # it is left with the shape it had, and the graph traced again
                continue
        behind.add(node)
        if is_op(node, aten.sym_size.int):
            size = shape(node.args[0])[node.args[1]]  # type: ignore[arg-type,index]
            if isinstance(size, int):
                node.replace_all_uses_with(size)  # type: ignore[arg-type]


def combined(
    graph: fx.Graph, new: fx.Node, rows: fx.Node, order: Order, ctx: PassContext
) -> tuple[fx.Node, fx.Node, fx.Node]:
    """The experts' op over tokens in place of ``new`` over their choices' rows, if what precedes
    and follows is known, else ``new``; the sums, and what replaced them."""
    down: Any = new.args[5]
    try:
        product = RowProduct(new, rows, down[0], False, order)
        combine = combine_of(product, shape(down[0])[0] if len(down) == 1 else len(down))
        if combine.bias is not None:
            return new, new, new
        plain, weights = scaled(rows, product, combine)
        x, _ = tokens_of(plain, order, combine.choices)
    except Miss:
        return new, new, new
    node, k = combine.result, combine.choices
    if val(x).dim() != 2:
        return new, new, new
    graph.inserting_before(node)

    def make(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return emit(graph, target, args, kwargs, like=new, fake_mode=ctx.fake_mode)

    tokens = shape(x)[0]
    norm, eps = (None, 0.0) if combine.norm is None else combine.norm.args[1:3]
    result = whole = make(
        dialect("moe_experts"), x, as_rows(order.choices, tokens, k, make),
        as_rows(weights, tokens, k, make), *new.args[3:11], combine.weights is None, norm, eps,
        new.args[14],
    )  # fmt: skip
    if val(node).dtype != val(result).dtype:
        result = make(_CAST, result, dtype=val(node).dtype)
    if combine.base is not None:
        result = make(aten.add.Tensor, combine.base, result)
    node.replace_all_uses_with(result)
    return whole, node, result
