"""Raise experts whose weights are gathered for every choice of every token -> ``moe_experts``.

    h = act(einsum("ti,taoi->tao", x, w1[index])) * einsum("ti,taoi->tao", x, w3[index])
    y = einsum("tao,taio->tai", h, w2[index]);  y = einsum("tai,ta->ti", y, weight)

as gpt-fast and gpt-oss write it, in any order of axes, by `einsum`, `bmm` or `matmul`, with biases
that are gathered too. Which axes meet which is read by `passes.axes`; what stands between the
products is recognised by its values. Weights gathered for flat rows are `raise_moe_experts`'.

Conditions: all weights and biases are gathered by the same indices; each token's rows are summed
over its choices with one weight each.

Worth: no copy of the experts' weights, which is three times their traffic.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from dspark_compile.passes.axes import Axes, Axis, Factor, Term
from dspark_compile.passes.base import Match, Pass, PassContext, Problem, dialect
from dspark_compile.passes.expert_gate import recognise
from dspark_compile.passes.graph import (
    TRANSPARENT,
    VIEWS,
    argument,
    aten,
    emit,
    is_dialect_op,
    is_op,
    is_tensor,
    known_equal,
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
_MOVES = (
    aten.permute.default, aten.unsqueeze.default, aten.squeeze.dim, aten.expand.default, *VIEWS,
    *_COPIES,
)  # fmt: skip


@dataclass(frozen=True)
class _Gathered:
    """Columns of a stack ``[E, out, in]`` (dimensions in that order), and of its bias."""

    stack: fx.Node
    order: tuple[int, ...]
    bias: fx.Node | None
    columns: torch.Tensor | None = None


class RaiseMoEGather(Pass):
    """See the module's docstring."""

    name = "raise_moe_gather"
    kind = "experts"
    stage = "raise"

    def pattern(self, graph: fx.Graph, ctx: PassContext) -> Iterator[Match]:
        known: set[fx.Node] = set()
        for node in list(graph.nodes):
            if node._erased or not _is_gathered(node, 3):
                continue
            axes = Axes(_weighs)
            root = _root(axes, node)
            if root is None or root in known:
                continue
            known.add(root)
            try:
                yield Match(root, captures=_experts(axes, node, root))
            except Miss as miss:
                stacks = [u for u in node.args[1][0].users if _is_gathered(u, 3)]
                if len(stacks) > 1:  # one product alone is no experts' second
                    yield Match(root, captures={"miss": miss})

    def check(self, match: Match, ctx: PassContext) -> Problem | None:
        miss: Miss | None = match.captures.get("miss")
        return None if miss is None else Problem(miss.condition, miss.hint, miss.node)

    def rewrite(self, match: Match, graph: fx.Graph, ctx: PassContext) -> None:
        node, recognised = match.anchor, match["activation"]
        graph.inserting_before(node)

        def make(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
            return emit(graph, target, args, kwargs, like=node, fake_mode=ctx.fake_mode)

        def arranged(item: _Gathered) -> tuple[list[Any], list[Any]]:
            stack, bias = item.stack, item.bias
            if item.order != (0, 1, 2):
                stack = make(aten.permute.default, stack, list(item.order))
            if item.columns is not None:
                stack = make(aten.slice.Tensor, stack, 1, *_slice(item.columns))
                bias = bias and make(aten.slice.Tensor, bias, 1, *_slice(item.columns))
            return [stack], [] if bias is None else [bias]

        halves = [arranged(h) for h in match["halves"]]
        gate = ([], []) if recognised.gate is None else halves[recognised.gate]
        up = halves[-1 if recognised.gate is None else 1 - recognised.gate]
        down = arranged(match["down"])
        indices, weights, x = match["indices"], match["weights"], match["x"]
        lead = shape(indices)[:-1]
        if not same_shape(shape(x)[:-1], lead):
            x = make(aten.view.default, x, view_sizes((*lead, shape(x)[-1]), indices, make))
        if not same_shape(shape(weights), shape(indices)):
            weights = make(aten.view.default, weights, view_sizes(shape(indices), indices, make))
        new = make(
            dialect("moe_experts"), x, indices, weights, gate[0], up[0], down[0], gate[1], up[1],
            down[1], recognised.activation, list(recognised.limits), False, None, 0.0,
            module_path(node),
        )  # fmt: skip
        result = new
        if val(node).dtype != val(new).dtype:
            result = make(_CAST, new, dtype=val(node).dtype)
        if not same_shape(shape(node), shape(result)):
            result = make(aten.view.default, result, view_sizes(shape(node), indices, make))
        node.replace_all_uses_with(result)
        ctx.raised("experts", new)


def _slice(columns: torch.Tensor) -> tuple[int, ...]:
    start, step = int(columns[0]), int(columns[1] - columns[0]) if len(columns) > 1 else 1
    return start, start + step * (len(columns) - 1) + 1, step


def _is_gathered(node: Any, rank: int) -> bool:
    """Whether ``node`` is a stack of ``rank`` dimensions gathered by indices of two or more."""
    if not is_op(node, aten.index.Tensor) or len(node.args[1]) != 1 or not is_tensor(node):
        return False
    where, source = node.args[1][0], node.args[0]
    indexed = is_tensor(where) and val(where).dim() >= 2 and val(where).dtype != torch.bool
    return indexed and val(source).dim() == rank and val(source).is_floating_point()


def _weighs(node: fx.Node) -> bool:
    """Whether a multiplication spreads one operand over the last dimension of the other."""
    if not all(is_tensor(a) for a in node.args[:2]):
        return False
    last = [shape(a)[-1:] for a in node.args[:2]]  # type: ignore[arg-type]
    ones = [bool(n) and known_equal(n[0], 1) for n in last]
    return ones[0] != ones[1]


def _root(axes: Axes, gathered: fx.Node) -> fx.Node | None:
    """The sum over a token's choices of what is computed with ``gathered``, if it is the experts'
    last product: nothing but biases and weights in between."""
    todo, seen = [gathered], {gathered}
    factor = axes.factor(gathered)
    choices = factor.dims[-3]
    while todo:
        node = todo.pop(0)
        for user in node.users:
            if user in seen or len(seen) > 24:
                continue
            seen.add(user)
            if is_op(user, aten.bmm.default, aten.sum.dim_IntList) or is_dialect_op(user, "matmul"):
                term = axes.term(user)
                if _sums_choices(axes, term, gathered, choices):
                    return user
                todo.append(user)
            elif is_op(user, aten.add.Tensor, aten.mul.Tensor, *_MOVES):
                todo.append(user)
    return None


def _sums_choices(axes: Axes, term: Term, gathered: fx.Node, choices: tuple[Axis, ...]) -> bool:
    """Whether a term with ``gathered``, or a product of it with a bias, lacks its choices' axis."""
    for factor in term.factors:
        if factor.node is gathered:
            gone = axes.flat((choices,))
        else:
            product = _biased(axes, factor.node)
            if product is None or all(f.node is not gathered for f in product[0].factors):
                continue
            gone = axes.flat((factor.dims[-2],)) if len(factor.dims) > 2 else []
        return len(gone) == 1 and gone[0] not in axes.flat(term.dims)
    return False


def _biased(axes: Axes, node: fx.Node) -> tuple[Term, fx.Node] | None:
    """(product, gathered bias) if ``node`` is their sum."""
    node = peel(node, _COPIES)
    if not is_op(node, aten.add.Tensor) or node.kwargs.get("alpha", 1) != 1:
        return None
    for a, b in (node.args, node.args[::-1]):
        bias = peel(b, _COPIES)
        if _is_gathered(bias, 2) and is_tensor(a) and same_shape(shape(a), shape(bias)):
            return axes.term(a), bias  # type: ignore[arg-type]
    return None


def _experts(axes: Axes, gathered: fx.Node, root: fx.Node) -> dict[str, Any]:
    """What the sum ``root`` is made of.

    Raises:
        Miss: it is not the sum of experts that are known.
    """
    indices: Any = gathered.args[1][0]  # type: ignore[index]
    term, bias = axes.term(root), None
    factors = list(term.factors)
    for factor in term.factors:
        found = _biased(axes, factor.node)
        if found is None or all(f.node is not gathered for f in found[0].factors):
            continue
        inner, bias = found
        if len(inner.dims) != len(factor.dims) or not all(
            axes._match(a, b) for a, b in zip(inner.dims, factor.dims, strict=True)
        ):
            raise Miss("the experts' biases are not added to their rows", root)
        factors = [f for f in factors if f is not factor] + list(inner.factors)
        break
    down = next((f for f in factors if f.node is gathered), None)
    if down is None or len(factors) != 3:
        raise Miss("weights gathered for each choice meet more than rows and scores", root)
    lead = axes.flat(down.dims[:-3])
    choice = axes.flat(down.dims[:-2])
    others = [f for f in factors if f is not down]
    scores = [f for f in others if axes.flat(f.dims) == choice]
    if len(scores) != 1:
        raise Miss("the experts' rows are summed without the router's weights", root)
    (hidden,) = [f for f in others if f is not scores[0]]
    out = axes.flat(term.dims)
    last = axes.flat(down.dims[-2:])
    if out[:-1] != lead or len(out) != len(lead) + 1 or out[-1] not in last or len(last) != 2:
        raise Miss("the sum over a token's choices is over something else", root)
    features = out[-1]
    inner_axis = last[0] if last[1] is features else last[1]
    if axes.flat(hidden.dims) != [*choice, inner_axis]:
        raise Miss("the experts' second product is not over their own axes", root)
    order = (0, 1, 2) if last[0] is features else (0, 2, 1)
    program = pointwise_before(hidden.node, lambda n: _biased(axes, n) is not None)
    halves, inputs = [], set()
    for leaf in program.leaves:
        x, half = _up(axes, leaf, hidden, indices)
        halves.append(half)
        inputs.add(x)
    if len(inputs) != 1:
        raise Miss("the experts see different tokens", root)
    activation = recognise(program)
    if activation is None:
        raise Miss("the experts compute no activation of the dialect's", program.root)
    return {
        "x": inputs.pop(), "indices": indices, "weights": scores[0].node, "halves": halves,
        "activation": activation,
        "down": _Gathered(gathered.args[0], order, _bias(bias, indices)),  # type: ignore[arg-type]
    }  # fmt: skip


def _bias(bias: fx.Node | None, indices: fx.Node) -> fx.Node | None:
    if bias is None:
        return None
    if peel(bias.args[1][0]) is not peel(indices):  # type: ignore[index]
        raise Miss("an expert's bias is gathered by other indices", bias)
    return bias.args[0]  # type: ignore[return-value]


def _up(axes: Axes, leaf: fx.Node, hidden: Factor, indices: fx.Node) -> tuple[fx.Node, _Gathered]:
    """The tokens, and the weights of a product that the activation reads."""
    base, columns = peel(leaf), None
    if is_op(base, aten.slice.Tensor):
        rank = val(base).dim()
        if int(argument(base, 1, "dim", 0)) % rank != rank - 1:
            raise Miss("an expert's hidden values are cut along another axis", leaf)
        size = shape(base.args[0])[-1]
        start, stop = argument(base, 2, "start", 0) or 0, argument(base, 3, "end")
        stop = size if stop is None else min(int(stop), size)
        columns = torch.arange(int(start), stop, argument(base, 4, "step", 1))
        base = peel(base.args[0])
    found = _biased(axes, base)
    bias = None
    term = axes.term(base)
    if found is not None:
        term, bias = found
    if len(term.factors) != 2 or len(term.dims) != len(hidden.dims):
        raise Miss("an expert's hidden values are no product of its weights with tokens", leaf)
    x, weight = term.factors
    if not _is_gathered(weight.node, 3):
        x, weight = weight, x
    if not _is_gathered(weight.node, 3):
        raise Miss("an expert's hidden values are no product of its weights with tokens", leaf)
    if peel(weight.node.args[1][0]) is not peel(indices):  # type: ignore[index]
        raise Miss("the experts' weights are gathered by different indices", leaf)
    for a, b in zip(term.dims[:-1], hidden.dims[:-1], strict=True):
        if not axes._match(a, b):
            raise Miss("the experts' products run over different axes", leaf)
    made = axes.flat(term.dims[-1:])
    choice, last = axes.flat(weight.dims[:-2]), axes.flat(weight.dims[-2:])
    lead, taken = axes.flat(weight.dims[:-3]), axes.flat(x.dims)
    if axes.flat(hidden.dims[:-1]) != choice or taken[:-1] != lead:
        raise Miss("an expert's tokens are not what its weights are gathered for", leaf)
    if len(made) != 1 or len(last) != 2 or set(last) != {made[0], taken[-1]}:
        raise Miss("the experts' weights run over other axes than theirs", leaf)
    if columns is None and not axes._match(term.dims[-1], hidden.dims[-1]):
        raise Miss("the experts' products run over different axes", leaf)
    order = (0, 1, 2) if last[0] is made[0] else (0, 2, 1)
    stack: Any = weight.node.args[0]
    return x.node, _Gathered(stack, order, _bias(bias, indices), columns)
