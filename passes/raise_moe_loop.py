"""Raise a loop over experts that are modules of their own -> ``moe_experts`` over lists of weights.

    for e in range(E):
        token, slot = torch.where(choice == e)  # or a one-hot mask, or (choice == e).any(-1)
        y.index_add_(0, token, expert[e](x[token]) * weight[token, slot, None])

and what is the same: ``y[token] += …``, ``y = y + expert[e](x) * (weight * (choice == e)).sum(-1)``
over all tokens, or times a column of a table of scores (`passes.expert_table`). Each expert is an
MLP that `raise_mlp` has raised already.

and loops over the experts that are hit only (``for e in hit.nonzero()``), which were traced with a
turn for every expert (`passes.expert_loops`). Experts may be modules of their own or slices of a
stack; those behind the others may give their input back (zero-computation experts).

Conditions: every step of the sum takes one expert's rows of the same tokens, choices and weights;
experts are numbered from 0 without a gap and compute one activation; where their weights are
quantised, some kernel reads them so.

Worth: E gathers, products and scatters become one op, which reads only the experts that are hit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from torch import fx

from dspark_compile.passes import expert_loops
from dspark_compile.passes.base import Match, PassContext, Problem, dialect
from dspark_compile.passes.expert_rows import column
from dspark_compile.passes.expert_steps import Step, first_step, step
from dspark_compile.passes.expert_table import chosen_among, is_zero
from dspark_compile.passes.expert_weights import (
    activation_of,
    biases_of,
    differ,
    stacks_of,
    weights_of,
)
from dspark_compile.passes.fuse_quantized_experts import kernel_for
from dspark_compile.passes.graph import (
    aten,
    emit,
    is_dialect_op,
    is_op,
    known_equal,
    module_path,
    same_shape,
    shape,
    val,
    view_sizes,
)
from dspark_compile.passes.moe_rows import Order
from dspark_compile.passes.raise_moe_cuts import combined

_CAST = aten._to_copy.default


class RaiseMoELoop(expert_loops.LoopPass):
    """See the module's docstring."""

    name = "raise_moe_loop"

    def pattern(self, graph: fx.Graph, ctx: PassContext) -> Iterator[Match]:
        steps: dict[fx.Node, Step] = {}
        for node in graph.nodes:
            found = step(node)
            if found is not None:
                steps[node] = found
        continued = {s.before for s in steps.values()}
        for last in [n for n in steps if n not in continued]:
            chain: list[Step] = []
            node = last
            while node in steps:
                chain.insert(0, steps[node])
                node = steps[node].before
            base: Any = node
            start = first_step(node) if not chain[0].rows else None
            if start is not None:
                chain.insert(0, start)
                base = 0
            sums = {s.node for s in chain}
            chain.sort(key=lambda s: (s.expert, -1 if s.slot is None else s.slot))
            loops = [loop for loop in self.loops if sums & set(loop.values)]
            if len(chain) > 1 or loops:
                yield Match(last, captures={"chain": chain, "base": base, "loops": loops})

    def check(self, match: Match, ctx: PassContext) -> Problem | None:
        chain: list[Step] = match["chain"]
        first, kinds = chain[0], [s.mlp is None for s in chain]
        if first.mlp is None or kinds != sorted(kinds):
            return Problem("experts that give their input back are not behind the others", "")
        for item in chain:
            weights = [] if item.mlp is None else weights_of(item.mlp)
            quantised = any(is_dialect_op(w, "dequantize_weight") for w in weights)
            if quantised and not kernel_for(ctx, val(first.x).device):
                return Problem(
                    "the experts' weights are quantised, and each would be dequantised for it",
                    "the loop's own products read them quantised",
                    item.mlp,
                )
        for item in chain[1:]:
            if item.x is not first.x or item.choice is not first.choice:
                return Problem("the experts see different tokens or choices", "", item.part)
            if item.weight != first.weight or item.single != first.single:
                return Problem("the experts have different weights", "", item.part)
            if item.overwrites != first.overwrites:
                return Problem("some experts' rows are written, some added", "", item.part)
            if item.mlp is None:
                continue
            difference = differ(item.mlp, first.mlp)
            if difference is not None:
                return Problem(difference, "", item.mlp)
        problem = self._numbered(chain) or _written_once(chain, match["base"])
        if problem is not None:
            return problem
        if not known_equal(_rows(first.x, 1), _rows(first.choice, 0 if first.single else 1)):
            return Problem("tokens and choices differ in shape", "flatten both", first.mlp)
        try:
            for loop in match["loops"]:
                expert_loops.prove(loop, chain)
        except expert_loops.NotProved as error:
            return Problem(str(error), "", first.mlp)
        return None

    def _numbered(self, chain: list[Step]) -> Problem | None:
        """What is wrong with the experts' numbers, or the choices that are gone through."""
        first = chain[0]
        slots = sorted({-1 if s.slot is None else s.slot for s in chain})
        count = len(chain) // len(slots)
        found = [(s.expert, -1 if s.slot is None else s.slot) for s in chain]
        if found != [(e, slot) for e in range(count) for slot in slots]:
            return Problem("the experts are not numbered from 0 without a gap", "", first.mlp)
        if slots != [-1] and slots != list(range(len(slots))):
            return Problem("some of the choices are not gone through", "", first.mlp)
        if slots != [-1] and not known_equal(shape(first.choice)[-1], len(slots)):
            return Problem("some of the choices are not gone through", "", first.mlp)
        by_expert: dict[int, list[Any]] = {}
        for item in chain:
            same = [] if item.mlp is None else [*weights_of(item.mlp), *biases_of(item.mlp)]
            if any(a is not b for a, b in zip(by_expert.setdefault(item.expert, same), same)):
                return Problem("an expert is another for another choice", "", item.mlp)
        if slots != [-1] and any(s.mlp is None for s in chain):
            return Problem("experts that give their input back, choice by choice", "", first.mlp)
        return None

    def rewrite(self, match: Match, graph: fx.Graph, ctx: PassContext) -> None:
        chain = match["chain"]
        first, node, base = chain[0], match.anchor, match["base"]
        graph.inserting_before(node)

        def make(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
            return emit(graph, target, args, kwargs, like=first.mlp, fake_mode=ctx.fake_mode)

        working = [s for s in chain if s.mlp is not None and s.slot in (None, 0)]
        stacks = stacks_of([s.mlp for s in working], make)
        choice = make(aten.unsqueeze.default, first.choice, -1) if first.single else first.choice
        weight, x = _weights(first, choice, make), first.x
        if not same_shape(shape(x)[:-1], shape(choice)[:-1]):
            sizes = view_sizes((*shape(choice)[:-1], shape(x)[-1]), choice, make)
            x = make(aten.view.default, x, sizes)
        new = make(
            dialect("moe_experts"), x, choice, weight, *stacks,
            activation_of(first.mlp), [], False, None, 0.0, module_path(first.mlp),
        )  # fmt: skip
        result = new
        if val(node).dtype != val(new).dtype:
            result = make(_CAST, new, dtype=val(node).dtype)
        if any(s.mlp is None for s in chain):
            result = make(aten.add.Tensor, result, _unchanged(chain, len(working), node, make))
        if not same_shape(shape(result), shape(node)):
            result = make(aten.view.default, result, view_sizes(shape(node), choice, make))
        if not first.overwrites and not is_zero(base):
            result = make(aten.add.Tensor, base, result)
        node.replace_all_uses_with(result)
        for loop in match["loops"]:
            loop.proved |= {result, *(s.node for s in chain)}
        names = {s.mlp.name for s in chain if s.mlp is not None}
        ctx.report.sites[:] = [s for s in ctx.report.sites if s.node not in names]
        sized = [n for s in chain for n in _sized(s)]
        whole = new
        if first.single and first.weight is None:
            # The code weighs the rows behind the loop, one for each choice of a token.
            order = Order(first.choice, first.choice, None)
            whole, old, summed = combined(graph, new, first.x, order, ctx)
            for loop in match["loops"]:
                loop.proved |= {summed} if old in loop.proved else set()
        ctx.raised("experts", whole)
        expert_loops.drop_checks(graph, sized)


def _rows(node: fx.Node, last: int) -> Any:
    """How many rows a tensor has, but for its ``last`` dimensions."""
    sizes = shape(node)
    return math.prod(sizes[: len(sizes) - last])


def _written_once(chain: list[Step], base: Any) -> Problem | None:
    """What keeps experts that write their rows from being a sum."""
    first = chain[0]
    if not first.overwrites:
        return None
    if not (first.single or (first.slot == 0 and known_equal(shape(first.choice)[-1], 1))):
        return Problem("the rows of a token's choices are written over each other", "", first.part)
    among = chosen_among(first.choice, apart=False)
    if not is_zero(base) and among != len(chain):
        return Problem("some rows may be no expert's and keep what they were", "", first.part)
    return None


def _weights(first: Step, choice: fx.Node, make: Any) -> fx.Node:
    """The weights of the choices, of their shape."""
    weight = first.weight
    if weight is None:
        return make(aten.ones_like.default, choice, dtype=val(first.x).dtype)  # type: ignore[no-any-return]
    node = weight.node
    if weight.dense:
        wide = (*shape(choice)[:-1], shape(node)[-1])
        if not same_shape(shape(node), wide):
            node = make(aten.view.default, node, view_sizes(wide, choice, make))
        return make(aten.gather.default, node, -1, choice)  # type: ignore[no-any-return]
    if not same_shape(shape(node), shape(choice)):
        node = make(aten.view.default, node, view_sizes(shape(choice), choice, make))
    return node


def _unchanged(chain: list[Step], working: int, like: fx.Node, make: Any) -> fx.Node:
    """``x`` times the weights of the choices that give it back, of the dtype of ``like``."""
    first = chain[0]
    choice = make(aten.unsqueeze.default, first.choice, -1) if first.single else first.choice
    idle = make(aten.ge.Scalar, choice, working)
    among = chosen_among(first.choice, apart=False)
    if among is None or len(chain) < among:
        idle = make(aten.logical_and.default, idle, make(aten.lt.Scalar, choice, len(chain)))
    share = make(aten.mul.Tensor, _weights(first, choice, make), idle)
    total = make(aten.sum.dim_IntList, share, [-1], True)
    part = make(aten.mul.Tensor, first.x, total)
    if val(part).dtype != val(like).dtype:
        part = make(_CAST, part, dtype=val(like).dtype)
    return part


# -- what is left ---------------------------------------------------------------------------------


def _sized(step: Step) -> list[fx.Node]:
    """The nodes whose results' size is the number of an expert's rows."""
    found: list[fx.Node] = []
    for rows in step.rows:
        place = column(rows)
        if place is not None:
            found.append(place[0])
        found += [u for u in rows.users if is_op(u, aten.index.Tensor, aten.index_select.default)]
    return found
