"""Join a residual addition with the norm that reads the sum.

    s = a + b; y = rms_norm(s, w)       -> y, s = add_rms_norm(a, b, w)
    s = a + b; y = layer_norm(s, w, c)  -> y, s = add_layer_norm(a, b, w, c)

Views between the two that only merge leading dimensions move behind the norm. ``s`` is the
next residual; its users take the op's second result. Conditions: both addends
have the sum's shape and dtype, the sum is not scaled (``alpha``), and the op can stand where
every input is known and no user of the sum has come yet. Of two norms on one sum (parallel
attention and MLP) the first is joined; the other reads the sum.

Worth: one read of the sum saved at every norm, two a layer; at decode, one launch fewer.
The sum is rounded to its own dtype before the norm reads it, as before.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from dspark_compile.passes.base import Match, Pass, PassContext, Problem, dialect
from dspark_compile.passes.graph import (
    VIEWS,
    aten,
    dialect_name,
    dtype,
    emit,
    emit_getitem,
    is_dialect_op,
    is_op,
    is_tensor,
    known_equal,
    order,
    same_shape,
    shape,
    val,
)

_JOINED = {"rms_norm": "add_rms_norm", "layer_norm": "add_layer_norm"}


class AddNorm(Pass):
    """See the module's docstring."""

    name = "add_norm"
    kind = "norm"
    stage = "optimise"

    def pattern(self, graph: fx.Graph, ctx: PassContext) -> Iterator[Match]:
        for node in list(graph.nodes):
            if not is_dialect_op(node, *_JOINED) or not node.users:
                continue
            total = below_views(node)
            if is_op(total, aten.add.Tensor) and _is_residual(total):
                yield Match(node, [total], {"total": total})

    def check(self, match: Match, ctx: PassContext) -> Problem | None:
        total: fx.Node = match["total"]
        if total.kwargs:
            return Problem("the addition scales one side (alpha)", "", total)
        for addend in total.args:
            assert isinstance(addend, fx.Node)
            if dtype(addend) != dtype(total) or val(addend).device != val(total).device:
                return Problem("the addends differ in dtype", "add tensors of one dtype", total)
        if _spot(match) is None:
            return Problem("the sum is used before the norm's weight is known", "", match.anchor)
        return None

    def rewrite(self, match: Match, graph: fx.Graph, ctx: PassContext) -> None:
        node, total = match.anchor, match["total"]
        spot = _spot(match)
        assert spot is not None
        x, residual = total.args
        position = order(graph)
        if position[x] < position[residual]:
            # The later addend is the branch, the earlier one the residual stream.
            x, residual = residual, x
        name = dialect_name(node)
        with graph.inserting_before(spot):
            pair = emit(
                graph,
                dialect(_JOINED[name]),
                (x, residual, *node.args[1:]),
                dict(node.kwargs),
                like=node,
                fake_mode=ctx.fake_mode,
            )
            normed, summed = emit_getitem(graph, pair, 0), emit_getitem(graph, pair, 1)
            if normed.meta["val"].dim() != val(node).dim():
                sizes = list(shape(node))
                normed = emit(
                    graph, aten.view.default, (normed, sizes), like=node, fake_mode=ctx.fake_mode
                )
        total.replace_all_uses_with(summed)
        node.replace_all_uses_with(normed)
        ctx.moved(node, pair)
        graph.erase_node(node)
        graph.erase_node(total)


def below_views(norm: fx.Node) -> fx.Node:
    """What a norm reads, below views that only merge or split leading dimensions (by numbers)."""
    node = norm.args[0]
    assert isinstance(node, fx.Node)
    weight = norm.args[1]
    if isinstance(weight, fx.Node) and val(weight).dim() != 1:
        return node
    fixed = all(isinstance(s, int) for s in shape(norm))
    while fixed and is_op(node, *VIEWS) and is_tensor(node.args[0]):
        source = node.args[0]
        assert isinstance(source, fx.Node)
        if not shape(source) or not known_equal(shape(source)[-1], shape(node)[-1]):
            break
        node = source
    return node


def _is_residual(total: fx.Node) -> bool:
    """Whether both addends have the sum's shape (biases and position tables have not)."""
    return all(is_tensor(a) and same_shape(shape(a), shape(total)) for a in total.args)  # type: ignore[arg-type]


def _spot(match: Match) -> fx.Node | None:
    """Where the joined op may stand: at the sum, else at the norm; None if nowhere."""
    node, total = match.anchor, match["total"]
    inputs = [n for n in node.all_input_nodes if n is not node.args[0]]
    if all(n < total for n in inputs):
        return total
    if all(user is node or node < user for user in total.users):
        return node
    return None
