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

from collections.abc import Iterator
from typing import Any

from torch import fx

from dspark_compile.passes import expert_loops
from dspark_compile.passes.base import Match, PassContext, Problem, dialect
from dspark_compile.passes.expert_steps import Step, column, first_step, step
from dspark_compile.passes.expert_table import is_zero
from dspark_compile.passes.expert_weights import activation_of, differ, stacks_of, weights_of
from dspark_compile.passes.fuse_quantized_experts import kernel_for
from dspark_compile.passes.graph import (
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
)

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
            start = first_step(node) if chain[0].mlp is not None else None
            if start is not None:
                chain.insert(0, start)
                base = 0
            chain.sort(key=lambda s: s.expert)
            loops = [loop for loop in self.loops if last in loop.values]
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
            if item.weight is not first.weight:
                return Problem("the experts have different weights", "", item.part)
            if item.mlp is None:
                continue
            difference = differ(item.mlp, first.mlp)
            if difference is not None:
                return Problem(difference, "", item.mlp)
        if [s.expert for s in chain] != list(range(len(chain))):
            return Problem("the experts are not numbered from 0 without a gap", "", first.mlp)
        lead = shape(first.choice)[:-1]
        if not same_shape(shape(first.x)[:-1], lead):
            return Problem("tokens and choices differ in shape", "flatten both", first.mlp)
        try:
            for loop in match["loops"]:
                expert_loops.prove(loop, chain)
        except expert_loops.NotProved as error:
            return Problem(str(error), "", first.mlp)
        return None

    def rewrite(self, match: Match, graph: fx.Graph, ctx: PassContext) -> None:
        chain = match["chain"]
        first, node, base = chain[0], match.anchor, match["base"]
        graph.inserting_before(node)

        def make(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
            return emit(graph, target, args, kwargs, like=first.mlp, fake_mode=ctx.fake_mode)

        working = [s for s in chain if s.mlp is not None]
        stacks = stacks_of([s.mlp for s in working], make)
        new = make(
            dialect("moe_experts"), first.x, first.choice, first.weight, *stacks,
            activation_of(first.mlp), [], False, None, 0.0, module_path(first.mlp),
        )  # fmt: skip
        result = new
        if val(node).dtype != val(new).dtype:
            result = make(_CAST, new, dtype=val(node).dtype)
        if len(working) < len(chain):
            result = make(aten.add.Tensor, result, _unchanged(chain, len(working), node, make))
        if not is_zero(base):
            result = make(aten.add.Tensor, base, result)
        node.replace_all_uses_with(result)
        for loop in match["loops"]:
            loop.proved.add(result)
        names = {s.mlp.name for s in working}
        ctx.report.sites[:] = [s for s in ctx.report.sites if s.node not in names]
        ctx.raised("experts", new)
        expert_loops.drop_checks(graph, [n for s in chain for n in _sized(s)])


def _unchanged(chain: list[Step], working: int, like: fx.Node, make: Any) -> fx.Node:
    """``x`` times the weights of the choices that give it back, of the dtype of ``like``."""
    first = chain[0]
    idle = make(aten.ge.Scalar, first.choice, working)
    if len(chain) < _most(first.choice):
        idle = make(aten.logical_and.default, idle, make(aten.lt.Scalar, first.choice, len(chain)))
    share = make(aten.mul.Tensor, first.weight, idle)
    total = make(aten.sum.dim_IntList, share, [-1], True)
    part = make(aten.mul.Tensor, first.x, total)
    if val(part).dtype != val(like).dtype:
        part = make(_CAST, part, dtype=val(like).dtype)
    return part


def _most(choice: fx.Node) -> float:
    """Below what the choices are, if that is known."""
    node = peel(choice)
    source: Any = node.args[0] if node.op == "call_function" and node.args else None
    if is_op(source, aten.topk.default) and int(argument(source, 2, "dim", -1)) in (-1, 1):
        size = shape(source.args[0])[-1]
        return size if isinstance(size, int) else float("inf")
    return float("inf")


# -- what is left ---------------------------------------------------------------------------------


def _sized(step: Step) -> list[fx.Node]:
    """The nodes whose results' size is the number of an expert's rows."""
    node: Any = step.part if step.mlp is None else step.mlp.args[0]
    while isinstance(node, fx.Node) and not is_op(node, aten.index.Tensor):
        node = node.args[0] if node.args else None
    if node is None:
        return []
    rows = peel(next(w for w in node.args[1] if w is not None))  # type: ignore[union-attr]
    place = column(rows) if rows.op == "call_function" else None
    if place is not None:
        return [place[0]]
    return [u for u in rows.users if is_op(u, aten.index.Tensor)]
