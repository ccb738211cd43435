"""Raise experts that all compute every token, weighted by a table of scores that is mostly 0.

    table = zeros(T, E).scatter(1, index, weight)           or probabilities times such a mask
    h = act(einsum("td,efd->tef", x, gate)) * einsum("td,efd->tef", x, up)
    y = einsum("tef,edf,te->td", h, down, table)            -> moe_experts(x, index, weight, …)

however the products are spelt (`einsum`, `bmm`, `matmul` that broadcasts, views around them) and
wherever the table is multiplied in; and the same over modules: ``torch.stack([e(x) for e in
experts])`` in place of the products.

Which axes meet which is read by `passes.axes`; what stands between the products is recognised by
its values. A table is mostly 0 if it is made of zeros by a scatter of a top-k, whose indices differ
from each other.

Conditions: no biases in stacked products; the experts' outputs are finite (0 times infinity is what
eager code would add).

Worth: k / E of the weights read, and of the work.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx

from dspark_compile.passes.axes import Axes, Axis, Factor
from dspark_compile.passes.base import Match, Pass, PassContext, Problem, dialect
from dspark_compile.passes.expert_gate import recognise
from dspark_compile.passes.expert_steps import MLPS
from dspark_compile.passes.expert_table import Table, table_of
from dspark_compile.passes.expert_weights import activation_of, differ, stacks_of, weights_of
from dspark_compile.passes.fuse_quantized_experts import kernel_for
from dspark_compile.passes.graph import (
    TRANSPARENT,
    VIEWS,
    argument,
    aten,
    emit,
    is_dialect_op,
    is_op,
    module_path,
    peel,
    same_shape,
    shape,
    val,
    view_sizes,
)
from dspark_compile.passes.moe_rows import Miss
from dspark_compile.passes.pointwise import pointwise_before

_CAST = aten._to_copy.default
_COPIES = TRANSPARENT | {_CAST}


class RaiseMoETable(Pass):
    """See the module's docstring."""

    name = "raise_moe_table"
    kind = "experts"
    stage = "raise"

    def pattern(self, graph: fx.Graph, ctx: PassContext) -> Iterator[Match]:
        nodes = list(graph.nodes)
        for node in nodes:
            table = None if node._erased else table_of(node)
            if table is None:
                continue
            found = _behind(table.node)
            if found is None:
                continue
            try:
                captures = _experts(table, found)
            except Miss as miss:
                # A softmax of few scores may be an attention's: what is of no experts goes unsaid.
                if not is_op(table.node, aten._softmax.default):
                    yield Match(found, captures={"miss": miss})
            else:
                yield Match(found, captures=captures)

    def check(self, match: Match, ctx: PassContext) -> Problem | None:
        miss: Miss | None = match.captures.get("miss")
        if miss is not None:
            return Problem(miss.condition, miss.hint, miss.node)
        for mlp in match.captures.get("mlps", ()):
            quantised = any(is_dialect_op(w, "dequantize_weight") for w in weights_of(mlp))
            if quantised and not kernel_for(ctx, val(match.anchor).device):
                return Problem("the experts' weights are quantised, and all would be dequantised")
            difference = differ(mlp, match["mlps"][0])
            if difference is not None:
                return Problem(difference, "", mlp)
            if mlp.args[0] is not match["mlps"][0].args[0]:
                return Problem("the experts see different tokens", "", mlp)
        return None

    def rewrite(self, match: Match, graph: fx.Graph, ctx: PassContext) -> None:
        node, table = match.anchor, match["table"]
        graph.inserting_before(node)

        def make(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
            return emit(graph, target, args, kwargs, like=node, fake_mode=ctx.fake_mode)

        if "mlps" in match.captures:
            mlps = match["mlps"]
            stacks: Any = stacks_of(mlps, make)
            x, activation, limits = mlps[0].args[0], activation_of(mlps[0]), []
            sites = {m.name for m in mlps}
            ctx.report.sites[:] = [s for s in ctx.report.sites if s.node not in sites]
        else:
            x, recognised = match["x"], match["activation"]
            made = [_arranged(w, make) for w in (*match["halves"], match["down"])]
            gate = [] if recognised.gate is None else [made[recognised.gate]]
            up = made[-2 if recognised.gate is None else 1 - recognised.gate]
            stacks = (gate, [up], [made[-1]], [], [], [])
            activation, limits = recognised.activation, list(recognised.limits)
        lead = shape(table.indices)[:-1]
        if not same_shape(shape(x)[:-1], lead):
            x = make(aten.view.default, x, view_sizes((*lead, shape(x)[-1]), table.indices, make))
        weights = table.weights
        if weights is None:
            weights = make(aten.gather.default, table.dense, -1, table.indices)
        new = make(
            dialect("moe_experts"), x, table.indices, weights, *stacks, activation, limits, False,
            None, 0.0, module_path(node),
        )  # fmt: skip
        result = new
        if val(node).dtype != val(new).dtype:
            result = make(_CAST, new, dtype=val(node).dtype)
        if not same_shape(shape(node), shape(result)):
            result = make(aten.view.default, result, view_sizes(shape(node), table.indices, make))
        node.replace_all_uses_with(result)
        ctx.raised("experts", new)


def _behind(table: fx.Node) -> fx.Node | None:
    """The node with the sum over experts that ``table`` is multiplied into: the first product or
    sum behind it that lacks its last axis."""
    todo, seen = [table], {table}
    while todo:
        node = todo.pop(0)
        for user in node.users:
            if user in seen or len(seen) > 24:
                continue
            seen.add(user)
            product = is_op(user, aten.bmm.default) or is_dialect_op(user, "matmul")
            if product or is_op(user, aten.sum.dim_IntList):
                axes = _reader(table)
                term = axes.term(user)
                mine = next((f for f in term.factors if f.node is table), None)
                if mine is None:
                    continue
                if axes.same(mine.dims[-1][0]) not in axes.flat(term.dims):
                    if len(term.factors) > 1:
                        return user
                    continue  # what normalises the scores, say
                todo.append(user)
            elif is_op(user, aten.mul.Tensor, aten.permute.default, aten.unsqueeze.default,
                       aten.squeeze.dim, aten.expand.default, *VIEWS, *_COPIES):  # fmt: skip
                todo.append(user)
    return None


def _reader(table: fx.Node) -> Axes:
    """Reads products of which the table is a factor, the table itself as one."""

    def leads(node: fx.Node) -> bool:
        return any(
            peel(a, _COPIES | VIEWS | {aten.permute.default, aten.unsqueeze.default,
                                       aten.squeeze.dim, aten.expand.default}) is table
            for a in node.args
        )  # fmt: skip

    return Axes(lambda node: node is not table and leads(node), table)


@dataclass(frozen=True)
class _Weight:
    """A stack as ``[E, out, in]``: dimensions in that order, and the rows that are meant."""

    node: fx.Node
    order: tuple[int, ...]
    rows: tuple[int, int] | None = None


def _arranged(weight: _Weight, make: Any) -> fx.Node:
    node = weight.node
    if weight.order != (0, 1, 2):
        node = make(aten.permute.default, node, list(weight.order))
    if weight.rows is not None:
        node = make(aten.slice.Tensor, node, 1, *weight.rows)
    return node


def _experts(table: Table, root: fx.Node) -> dict[str, Any]:
    """What the sum ``root`` is made of.

    Raises:
        Miss: it is not the sum of experts that are known.
    """
    axes = _reader(table.node)
    term = axes.term(root)
    mine, others = None, []
    for factor in term.factors:
        if factor.node is table.node and mine is None:
            mine = factor
        else:
            others.append(factor)
    assert mine is not None
    tokens, expert = axes.flat(mine.dims[:-1]), axes.same(mine.dims[-1][0])
    out = axes.flat(term.dims)
    if out[: len(tokens)] != tokens or len(out) != len(tokens) + 1:
        raise Miss("a table of scores meets products that are no sum over experts", root)
    features = out[-1]
    if len(others) == 1 and is_op(others[0].node, aten.stack.default):
        return {"table": table, "mlps": _modules(axes, others[0], tokens, expert, features)}
    if len(others) != 2:
        raise Miss("scores of few experts multiply what is no product of theirs", root)
    hidden, down = others
    if set(axes.flat(down.dims)) & set(tokens):
        hidden, down = down, hidden
    inner = [a for a in axes.flat(down.dims) if a not in (expert, features)]
    if len(inner) != 1 or set(axes.flat(hidden.dims)) != {*tokens, expert, inner[0]}:
        raise Miss("the experts' second product is not over their own axes", root)
    order = _order(axes, down, (expert, features, inner[0]))
    program = pointwise_before(hidden.node)
    halves, inputs = [], set()
    for leaf in program.leaves:
        x, weight = _up(axes, leaf, hidden, tokens, expert, inner[0])
        halves.append(weight)
        inputs.add(x)
    if len(inputs) != 1:
        raise Miss("the experts see different tokens", root)
    activation = recognise(program)
    if activation is None:
        raise Miss("the experts compute no activation of the dialect's", program.root)
    return {
        "table": table, "x": inputs.pop(), "halves": halves, "activation": activation,
        "down": _Weight(down.node, order),
    }  # fmt: skip


def _order(axes: Axes, factor: Factor, wanted: tuple[Axis, ...]) -> tuple[int, ...]:
    """The dimensions of a stack that run over the axes ``wanted``."""
    flat = [axes.flat((run,)) for run in factor.dims]
    if sorted(len(run) for run in flat) != [1, 1, 1]:
        raise Miss("the experts' weights are not stacked in three dimensions", factor.node)
    found = [run[0] for run in flat]
    if set(found) != set(wanted):
        raise Miss("the experts' weights run over other axes than theirs", factor.node)
    return tuple(found.index(axis) for axis in wanted)


def _up(
    axes: Axes, leaf: fx.Node, hidden: Factor, tokens: list[Axis], expert: Axis, inner: Axis
) -> tuple[fx.Node, _Weight]:
    """The tokens and the weight of a product that the activation reads."""
    rows = None
    base = peel(leaf)
    term = axes.term(base)
    along = next(i for i, run in enumerate(hidden.dims) if axes.flat((run,)) == [inner])
    dims = term.dims
    if is_op(base, aten.slice.Tensor) and int(argument(base, 1, "dim", 0)) % len(dims) == along:
        size = shape(base.args[0])[along]
        start, stop = argument(base, 2, "start", 0) or 0, argument(base, 3, "end")
        stop = size if stop is None else min(int(stop), size)
        if argument(base, 4, "step", 1) != 1:
            raise Miss("gate and up alternate in one product", leaf)
        term, rows = axes.term(base.args[0]), (int(start), int(stop))
        dims = term.dims
    if len(term.factors) != 2 or len(dims) != len(hidden.dims):
        raise Miss("an expert's hidden values are no product of its weights with tokens", leaf)
    mine = None
    for i, (a, b) in enumerate(zip(dims, hidden.dims, strict=True)):
        if i == along:
            mine = axes.flat((a,))
        elif not axes._match(a, b):
            raise Miss("the experts' products run over different axes", leaf)
    x, weight = term.factors
    lead = axes.flat((tuple(tokens),))  # as the products have matched them by now
    if set(axes.flat(weight.dims)) & set(lead):
        x, weight = weight, x
    taken = axes.flat(x.dims)
    if mine is None or len(mine) != 1 or taken[:-1] != lead or len(taken) != len(lead) + 1:
        raise Miss("an expert's tokens are not what its scores are of", leaf)
    order = _order(axes, weight, (axes.same(expert), mine[0], taken[-1]))
    return x.node, _Weight(weight.node, order, rows)


def _modules(
    axes: Axes, stack: Factor, tokens: list[Axis], expert: Axis, features: Axis
) -> list[fx.Node]:
    mlps = [peel(n, _COPIES) for n in stack.node.args[0]]  # type: ignore[union-attr]
    if not all(is_dialect_op(m, *MLPS) for m in mlps):
        raise Miss("experts that are stacked are no MLPs", stack.node)
    flat = axes.flat(stack.dims)
    wanted = axes.flat(((*tokens, features),))
    if [a for a in flat if a is not expert] != wanted or expert not in flat:
        raise Miss("a stack of experts is summed over something else", stack.node)
    return mlps
