"""Raise dense experts: every expert computes every token, scaled by scores that are mostly 0.

    x3[e, t] = x[t] * score[t, e];  y[t] = sum_e act(x3 @ gate_e) * (x3 @ up_e) @ down_e

as Llama 4 writes it, with score = f(scatter(-inf, index, top-k's values)) and f(-inf) = 0, becomes
``moe_experts`` over the k scattered experts with the weight on their input: an expert whose input
is 0 has a gated, bias-free result of 0.

Conditions: scores are scattered into a fill that the functions behind map to 0 (checked by running
them); no biases; act(0) * 0 is 0.

Worth: k / E of the weights read, and of the work.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from dspark_compile.passes.base import Match, Pass, PassContext, Problem, dialect
from dspark_compile.passes.expert_gate import recognise
from dspark_compile.passes.graph import (
    VIEWS,
    argument,
    aten,
    emit,
    is_dialect_op,
    is_op,
    known_equal,
    module_path,
    peel,
    same_shape,
    shape,
    val,
)
from dspark_compile.passes.moe_rows import Miss, columns
from dspark_compile.passes.pointwise import Pointwise, pointwise_before


class RaiseMoEDense(Pass):
    """See the module's docstring."""

    name = "raise_moe_dense"
    kind = "experts"
    stage = "raise"

    def pattern(self, graph: fx.Graph, ctx: PassContext) -> Iterator[Match]:
        for node in list(graph.nodes):
            if not is_op(node, aten.sum.dim_IntList) or val(node).dim() != 2:
                continue
            try:
                found = _find(node)
            except Miss as miss:
                yield Match(node, captures={"miss": miss})
                continue
            if found is not None:
                yield Match(node, captures=found)

    def check(self, match: Match, ctx: PassContext) -> Problem | None:
        miss: Miss | None = match.captures.get("miss")
        return None if miss is None else Problem(miss.condition, miss.hint, miss.node)

    def rewrite(self, match: Match, graph: fx.Graph, ctx: PassContext) -> None:
        node = match.anchor
        graph.inserting_before(node)

        def make(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
            return emit(graph, target, args, kwargs, like=match["down"], fake_mode=ctx.fake_mode)

        values: dict[fx.Node, Any] = {match["scattered"]: match["values"]}
        for step in match["functions"]:
            args = fx.node.map_arg(step.args, lambda n: values.get(n, n))
            values[step] = make(step.target, *args, **step.kwargs)
        weights = values[match["scores"]]

        def stacked(weight: fx.Node, which: torch.Tensor | None = None) -> fx.Node:
            turned = make(aten.permute.default, weight, [0, 2, 1])
            if which is None:
                return turned
            start, step = int(which[0]), int(which[1] - which[0]) if len(which) > 1 else 1
            stop = min(start + step * len(which), int(shape(turned)[1]))
            return make(aten.slice.Tensor, turned, 1, start, stop, step)

        activation = match["activation"]
        halves = [stacked(match["up"].args[1], which) for which in match["halves"]]
        gate, up = halves[activation.gate], halves[1 - activation.gate]
        new = make(
            dialect("moe_experts"), match["x"], match["indices"], weights, [gate], [up],
            [stacked(match["down"].args[1])], [], [], [], activation.activation,
            list(activation.limits), True, None, 0.0, module_path(match["down"]),
        )  # fmt: skip
        node.replace_all_uses_with(new)
        ctx.raised("experts", new)


def _find(total: fx.Node) -> dict[str, Any] | None:
    """The parts of dense experts that end in the sum ``total``; None if it is no such sum."""
    node = total.args[0]
    while is_op(node, *VIEWS):
        node = node.args[0]  # type: ignore[union-attr]
    if not is_dialect_op(node, "matmul") or val(node).dim() != 3:  # type: ignore[arg-type]
        return None
    down: fx.Node = node  # type: ignore[assignment]
    program = pointwise_before(down.args[0], lambda n: is_dialect_op(n, "matmul"))  # type: ignore[arg-type]
    bases: dict[fx.Node, None] = {}
    halves = []
    try:
        for leaf in program.leaves:
            base, which = _last_columns(leaf)
            bases[base] = None
            halves.append(which)
    except Miss:
        return None
    if len(bases) != 1 or len(halves) != 2:
        return None
    (up,) = bases
    scaled = peel(up.args[0])
    while is_op(scaled, *VIEWS):
        scaled = peel(scaled.args[0])
    if not is_op(scaled, aten.mul.Tensor):
        return None
    x, spread = scaled.args[:2]
    if not is_op(x, aten.repeat.default):
        x, spread = spread, x
    if not is_op(x, aten.repeat.default) or list(x.args[1])[1:] != [1]:
        return None
    experts = shape(down.args[1])[0]  # type: ignore[arg-type]
    dims = [int(d) % 3 for d in total.args[1]]  # type: ignore[union-attr,arg-type]
    if dims != [0] or argument(total, 2, "keepdim", False):
        raise Miss("dense experts are not summed over", total)
    tokens = x.args[0]
    whole = (experts, shape(tokens)[0], shape(down)[-1])
    if not same_shape(shape(total.args[0]), whole) or not known_equal(x.args[1][0], experts):  # type: ignore[arg-type]
        raise Miss("dense experts are summed over something else", total)
    activation = recognise(program)
    if activation is None or activation.gate is None:
        raise Miss("the experts compute no gated activation of the dialect's", program.root)
    zero = torch.zeros(1, dtype=torch.float64)
    if program.evaluate([zero, zero]) != 0:
        raise Miss("an expert's result for a token of 0 is not 0", program.root)
    return {
        "down": down, "up": up, "x": tokens, "halves": halves, "activation": activation,
        **_scattered(spread, shape(tokens)[0], experts),
    }  # fmt: skip


def _last_columns(leaf: fx.Node) -> tuple[fx.Node, torch.Tensor]:
    """`columns` for a batch: slices of the last dimension of a matmul's result."""
    node: Any = leaf
    if is_op(node, aten.slice.Tensor) and val(node).dim() == 3:
        dim = int(argument(node, 1, "dim", 0)) % 3
        base = peel(node.args[0])
        if dim == 2 and is_dialect_op(base, "matmul"):
            size = int(shape(base)[2])
            start = argument(node, 2, "start", 0) or 0
            stop = argument(node, 3, "end")
            step = argument(node, 4, "step", 1)
            stop = size if stop is None else min(int(stop), size)
            return base, torch.arange(int(start), stop, int(step))
    return columns(leaf, lambda n: is_dialect_op(n, "matmul") and val(n).dim() == 2)


def _scattered(spread: Any, tokens: Any, experts: Any) -> dict[str, Any]:
    """The sparse scores ``[T, E]`` behind ``spread [E * T, 1]``."""
    node = peel(spread)
    while is_op(node, *VIEWS):
        node = peel(node.args[0])
    if not is_op(node, aten.permute.default) or list(node.args[1]) != [1, 0]:
        raise Miss("the scores are not spread expert by expert", node)
    scores = node = peel(node.args[0])
    if not same_shape(shape(scores), (tokens, experts)):
        raise Miss("the scores are not one for each token and expert", scores)
    functions: list[fx.Node] = []
    while not is_op(node, aten.scatter.src, aten.scatter.value):
        pointwise = node.op == "call_function" and len(node.all_input_nodes) == 1
        if not pointwise or not same_shape(shape(node), shape(node.all_input_nodes[0])):
            raise Miss("dense experts with scores that are not a scattered top-k", node)
        functions.insert(0, node)
        node = node.all_input_nodes[0]
    fill, dim, indices = node.args[0], node.args[1], node.args[2]
    empty = _fill(fill)
    if int(dim) % 2 != 1 or empty is None or is_op(node, aten.scatter.value):
        raise Miss("dense experts with scores that are not a scattered top-k", node)
    program = Pointwise(scores, functions, [node])
    left = program.evaluate([torch.full((1,), empty, dtype=torch.float64)])
    if left is None or left != 0:
        raise Miss("the scores of experts that were not chosen are not 0", scores)
    return {
        "scattered": node, "indices": indices, "values": node.args[3], "functions": functions,
        "scores": scores if functions else node,
    }  # fmt: skip


def _fill(node: Any) -> float | None:
    """The number that a tensor is full of."""
    node = peel(node)
    if is_op(node, aten.full_like.default, aten.full.default):
        value = node.args[1]
        return float(value) if isinstance(value, (int, float)) else None
    if is_op(node, aten.zeros_like.default, aten.zeros.default):
        return 0.0
    if is_op(node, aten.masked_fill.Scalar):
        return None
    return None if not isinstance(node, (int, float)) or math.isnan(node) else float(node)
