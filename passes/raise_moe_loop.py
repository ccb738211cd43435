"""Raise a loop over experts that are modules of their own -> ``moe_experts`` over lists of weights.

    for e in range(E):
        token, slot = torch.where(choice == e)  # or a one-hot mask, or (choice == e).any(-1)
        y.index_add_(0, token, expert[e](x[token]) * weight[token, slot, None])

and what is the same: ``y[token] += …``, ``y = y + expert[e](x) * (weight * (choice == e)).sum(-1)``
over all tokens. Each expert is an MLP that `raise_mlp` has raised already.

Conditions: every step of the sum takes one expert's rows of the same tokens, choices and weights;
experts are numbered from 0 without a gap and compute one activation; their weights are not
quantised. A loop over the experts that
are hit (``for e in hit.nonzero()``) has no fixed length and is no graph to begin with.

Worth: E gathers, products and scatters become one op, which reads only the experts that are hit.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx

from dspark_compile.passes.base import Match, Pass, PassContext, Problem, dialect
from dspark_compile.passes.graph import (
    VIEWS,
    argument,
    aten,
    emit,
    is_dialect_op,
    is_op,
    is_tensor,
    module_path,
    peel,
    same_shape,
    shape,
    val,
)

_CAST = aten._to_copy.default
_MLPS = ("gated_mlp", "gated_mlp_merged", "mlp")


@dataclass(frozen=True)
class Mask:
    """``choice == expert``: ``[T, k]``, or ``[k, T]`` if ``turned``."""

    choice: fx.Node
    expert: int
    turned: bool


@dataclass(frozen=True)
class Step:
    """One expert's part of the sum.

    Attributes:
        before: the sum so far.
        mlp: the dialect op.
        x, choice, weight: of all tokens.
        expert: its number.
    """

    before: fx.Node
    mlp: fx.Node
    x: fx.Node
    choice: fx.Node
    weight: fx.Node
    expert: int


class RaiseMoELoop(Pass):
    """See the module's docstring."""

    name = "raise_moe_loop"
    kind = "experts"
    stage = "raise"

    def pattern(self, graph: fx.Graph, ctx: PassContext) -> Iterator[Match]:
        steps: dict[fx.Node, Step] = {}
        for node in graph.nodes:
            step = _step(node)
            if step is not None:
                steps[node] = step
        continued = {s.before for s in steps.values()}
        for last in [n for n in steps if n not in continued]:
            chain: list[Step] = []
            node = last
            while node in steps:
                chain.insert(0, steps[node])
                node = steps[node].before
            if len(chain) > 1:
                yield Match(last, captures={"chain": chain, "base": node})

    def check(self, match: Match, ctx: PassContext) -> Problem | None:
        chain: list[Step] = match["chain"]
        first = chain[0]
        for step in chain:
            quantised = any(is_dialect_op(w, "dequantize_weight") for w in _weights(step.mlp))
            if quantised and not ctx.shared.get("quantised_experts"):
                return Problem(
                    "the experts' weights are quantised, and each would be dequantised for it",
                    "the loop's own products read them quantised",
                    step.mlp,
                )
        for step in chain[1:]:
            if step.x is not first.x or step.choice is not first.choice:
                return Problem("the experts see different tokens or choices", "", step.mlp)
            if step.weight is not first.weight:
                return Problem("the experts have different weights", "", step.mlp)
            if _activation(step.mlp) != _activation(first.mlp):
                return Problem("the experts compute different activations", "", step.mlp)
            if [x is None for x in _biases(step.mlp)] != [x is None for x in _biases(first.mlp)]:
                return Problem("some experts have a bias and some have none", "", step.mlp)
            shapes = [shape(w) for w in _weights(step.mlp)]
            if shapes != [shape(w) for w in _weights(first.mlp)]:
                return Problem("the experts differ in size", "", step.mlp)
        if sorted(s.expert for s in chain) != list(range(len(chain))):
            return Problem("the experts are not numbered from 0 without a gap", "", first.mlp)
        lead = shape(first.choice)[:-1]
        if not same_shape(shape(first.x)[:-1], lead) or len(lead) != 1:
            return Problem("tokens and choices differ in shape", "flatten both", first.mlp)
        return None

    def rewrite(self, match: Match, graph: fx.Graph, ctx: PassContext) -> None:
        chain = sorted(match["chain"], key=lambda s: s.expert)
        first, node, base = chain[0], match.anchor, match["base"]
        graph.inserting_before(node)

        def make(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
            return emit(graph, target, args, kwargs, like=first.mlp, fake_mode=ctx.fake_mode)

        def half(x: Any, which: int) -> Any:
            if x is None:
                return None
            size = shape(x)[0] // 2
            return make(aten.slice.Tensor, x, 0, which * size, (which + 1) * size)

        gate: list[Any] = []
        up: list[Any] = []
        down: list[Any] = []
        biases: tuple[list[Any], list[Any], list[Any]] = ([], [], [])
        for step in chain:
            weights, bias = _weights(step.mlp), _biases(step.mlp)
            if is_dialect_op(step.mlp, "gated_mlp_merged"):
                weights = [half(weights[0], 0), half(weights[0], 1), weights[1]]
                bias = [half(bias[0], 0), half(bias[0], 1), bias[1]]
            elif is_dialect_op(step.mlp, "mlp"):
                weights, bias = [None, *weights], [None, *bias]
            for stack, item in zip((gate, up, down), weights, strict=True):
                stack += [] if item is None else [item]
            for stack, item in zip(biases, bias, strict=True):
                stack += [] if item is None else [item]
        new = make(
            dialect("moe_experts"), first.x, first.choice, first.weight, gate, up, down, *biases,
            _activation(first.mlp), [], False, None, 0.0, module_path(first.mlp),
        )  # fmt: skip
        result = new
        if val(node).dtype != val(new).dtype:
            result = make(_CAST, new, dtype=val(node).dtype)
        if not _is_zero(base):
            result = make(aten.add.Tensor, base, result)
        node.replace_all_uses_with(result)
        names = {s.mlp.name for s in chain}
        ctx.report.sites[:] = [s for s in ctx.report.sites if s.node not in names]
        ctx.raised("experts", new)
        _drop_checks(graph, [n for s in chain for n in _sized(s.mlp)])


# -- reading one step -----------------------------------------------------------------------------


def _step(node: fx.Node) -> Step | None:
    """``node`` as a sum that one more expert's rows are added to; None if it is none."""
    rows: Any = None
    if is_op(node, aten.index_add.default) and node.args[1] == 0:
        if argument(node, 4, "alpha", node.kwargs.get("alpha", 1)) != 1:
            return None
        before, rows, part = node.args[0], node.args[2], node.args[3]
    elif is_op(node, aten.index_put.default) and len(node.args[1]) == 1:  # type: ignore[arg-type]
        before, rows, part = node.args[0], node.args[1][0], node.args[2]  # type: ignore[index]
        if not argument(node, 3, "accumulate", False):
            if not is_op(part, aten.add.Tensor):
                return None
            kept, part = part.args[:2]  # type: ignore[union-attr]
            if not _gathers(kept, before, rows):
                kept, part = part, kept
            if not _gathers(kept, before, rows):
                return None
    elif is_op(node, aten.add.Tensor) and node.kwargs.get("alpha", 1) == 1:
        before, part = node.args[:2]
        if not _is_part(part):
            before, part = part, before
    else:
        return None
    if not isinstance(before, fx.Node) or not isinstance(part, fx.Node):
        return None
    return _read(before, part, peel(rows) if rows is not None else None)


def _is_part(node: Any) -> bool:
    node = _bare(node)
    return is_op(node, aten.mul.Tensor) and any(is_dialect_op(_bare(x), *_MLPS) for x in node.args)


def _bare(node: Any) -> Any:
    """``node`` without casts, copies and views."""
    while is_op(node, _CAST, *VIEWS, aten.unsqueeze.default, aten.squeeze.dim) or (
        isinstance(node, fx.Node) and peel(node) is not node
    ):
        node = node.args[0]
    return node


def _gathers(node: Any, source: Any, rows: Any) -> bool:
    return is_op(node, aten.index.Tensor) and node.args[0] is source and node.args[1] == [rows]


def _read(before: fx.Node, part: fx.Node, rows: fx.Node | None) -> Step | None:
    product = _bare(part)
    if not is_op(product, aten.mul.Tensor):
        return None
    for a, b in (product.args, product.args[::-1]):
        mlp = _bare(a)
        if not is_dialect_op(mlp, *_MLPS) or not is_tensor(b):
            continue
        if rows is None:
            mask, weight = _dense_weight(b)
            x = mlp.args[0]
        else:
            mask, weight = _row_weight(b, rows)
            x = _rows_of(mlp.args[0], rows)
        if mask is not None and weight is not None and x is not None:
            return Step(before, mlp, x, mask.choice, weight, mask.expert)
    return None


def _rows_of(node: Any, rows: fx.Node) -> fx.Node | None:
    """``x [T, K]`` if ``node`` is ``x[rows]``."""
    node = peel(node)
    while is_op(node, *VIEWS):
        node = peel(node.args[0])
    if not is_op(node, aten.index.Tensor):
        return None
    x, where = node.args[0], list(node.args[1])
    if len(where) == 2 and where[0] is None and is_op(x, aten.unsqueeze.default, *VIEWS):
        if val(x).dim() == 3 and shape(x)[0] == 1:
            x, where = x.args[0], where[1:]
    return x if len(where) == 1 and peel(where[0]) is rows and val(x).dim() == 2 else None


def _row_weight(node: Any, rows: fx.Node) -> tuple[Mask | None, fx.Node | None]:
    """(mask, weights ``[T, k]``) if ``node`` is ``weight[token, slot]`` for the mask's places."""
    node = _bare(node)
    if not is_op(node, aten.index.Tensor):
        return None, None
    source, where = node.args[0], [peel(w) for w in node.args[1]]
    if len(where) == 1 and where[0] is rows and is_op(rows, aten.any.dim):
        mask, weight = _dense_weight(source)
        chosen = _mask(rows.args[0])
        if chosen is None or chosen.turned or mask != chosen or int(rows.args[1]) not in (-1, 1):  # type: ignore[arg-type]
            return None, None
        return mask, weight
    if len(where) != 2 or where[0] is not rows:
        return None, None
    token, slot = _column(where[0]), _column(where[1])
    if token is None or slot is None or token[0] is not slot[0]:
        return None, None
    mask = _mask(token[0].args[0])
    if mask is None or (token[1], slot[1]) != ((1, 0) if mask.turned else (0, 1)):
        return None, None
    while is_op(source, *VIEWS, aten.unsqueeze.default) and val(source).dim() > 2:
        source = source.args[0]
    return (mask, source) if same_shape(shape(source), shape(mask.choice)) else (None, None)


def _column(node: Any) -> tuple[fx.Node, int] | None:
    """(nonzero node, which of its columns)."""
    node = peel(node)
    if is_op(node, aten.select.int) and int(node.args[1]) % 2 == 1:
        base, which = peel(node.args[0]), int(node.args[2])
    elif node.target is operator.getitem and is_op(node.args[0], aten.unbind.int):
        base, which = peel(node.args[0].args[0]), int(node.args[1])
    else:
        return None
    return (base, which) if is_op(base, aten.nonzero.default) else None


def _dense_weight(node: Any) -> tuple[Mask | None, fx.Node | None]:
    """(mask, weights) if ``node`` is ``(weight * mask).sum(-1)``, however spelt."""
    node = _bare(node)
    if not is_op(node, aten.sum.dim_IntList) or list(node.args[1]) not in ([-1], [1]):
        return None, None
    inner = _bare(node.args[0])
    if is_op(inner, aten.where.self):
        mask, weight, other = inner.args
        zero = _is_zero(other)
    elif is_op(inner, aten.mul.Tensor):
        a, b = inner.args
        mask, weight, zero = (a, b, True) if _mask(a) is not None else (b, a, True)
    elif is_op(inner, aten.masked_fill.Scalar) and inner.args[2] == 0:
        weight, opposite, _ = inner.args
        mask, zero = peel(opposite), is_op(opposite, aten.logical_not.default)
        mask = mask.args[0] if zero else mask
    else:
        return None, None
    found = _mask(mask)
    if not zero or found is None or found.turned or not is_tensor(weight):
        return None, None
    return (found, weight) if same_shape(shape(weight), shape(found.choice)) else (None, None)


def _mask(node: Any) -> Mask | None:
    """``node`` as ``choice == expert``."""
    while is_op(node, _CAST, aten.squeeze.dim) or (
        isinstance(node, fx.Node) and peel(node) is not node
    ):
        node = node.args[0]
    if is_op(node, aten.eq.Scalar) and isinstance(node.args[1], int) and val(node).dim() == 2:
        return Mask(node.args[0], node.args[1], False)
    if not is_op(node, aten.select.int):
        return None
    table, dim, expert = node.args
    order = [0, 1, 2]
    if is_op(table, aten.permute.default):
        order, table = [int(d) % 3 for d in table.args[1]], table.args[0]  # type: ignore[union-attr]
    while is_op(table, _CAST):
        table = table.args[0]
    if not is_op(table, aten.eq.Tensor) or val(table).dim() != 3 or not isinstance(expert, int):
        return None
    choice, numbers = table.args
    counted = is_op(numbers, aten.arange.default) and len(numbers.args) == 1
    if not counted or not is_op(choice, aten.unsqueeze.default) or val(choice.args[0]).dim() != 2:
        return None
    rest = [d for i, d in enumerate(order) if i != int(dim) % 3]
    if order[int(dim) % 3] != 2:
        return None
    return Mask(choice.args[0], expert, rest == [1, 0])


def _is_zero(node: Any) -> bool:
    """Whether ``node`` is full of zeros."""
    node = peel(node) if isinstance(node, fx.Node) else node
    if is_op(node, aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default):
        return True
    if is_op(node, aten.full.default, aten.full_like.default):
        return node.args[1] == 0
    return node == 0 or (is_op(node, aten.scalar_tensor.default) and node.args[0] == 0)


# -- the experts' weights -------------------------------------------------------------------------


def _weights(mlp: fx.Node) -> list[Any]:
    return list(mlp.args[1:4] if is_dialect_op(mlp, "gated_mlp") else mlp.args[1:3])


def _biases(mlp: fx.Node) -> list[Any]:
    return list(mlp.args[4:7] if is_dialect_op(mlp, "gated_mlp") else mlp.args[3:5])


def _activation(mlp: fx.Node) -> str:
    return mlp.args[7 if is_dialect_op(mlp, "gated_mlp") else 5]  # type: ignore[return-value]


# -- what is left ---------------------------------------------------------------------------------


def _sized(mlp: fx.Node) -> list[fx.Node]:
    """The nodes whose results' size is the number of an expert's rows."""
    node = mlp.args[0]
    while isinstance(node, fx.Node) and not is_op(node, aten.index.Tensor):
        node = node.args[0] if node.args else None
    if node is None:
        return []
    rows = peel(next(w for w in node.args[1] if w is not None))  # type: ignore[union-attr]
    column = _column(rows) if rows.op == "call_function" else None
    if column is not None:
        return [column[0]]
    return [u for u in rows.users if is_op(u, aten.index.Tensor)]


def _drop_checks(graph: fx.Graph, sized: list[fx.Node]) -> None:
    """Remove assertions about the number of an expert's rows: nothing has that size any more."""
    doubtful: set[fx.Node] = set()
    todo = list(sized)
    while todo:
        node = todo.pop()
        for user in node.users:
            if user not in doubtful and not is_tensor(user):
                doubtful.add(user)
                todo.append(user)
    graph.eliminate_dead_code()
    for node in reversed(list(graph.nodes)):
        if node in doubtful and not node.users and node.op == "call_function":
            graph.erase_node(node)
    graph.eliminate_dead_code()
