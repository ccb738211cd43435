"""Merge linears: products that share their input become one over stacked weights.

    q = linear(x, Wq); k = linear(x, Wk); v = linear(x, Wv)
        -> q, k, v = merged_linear(x, [Wq; Wk; Wv])

Opt-in (``options={"merge_linears": True}``), because the module's parameters become views
of the stacked storage (`runtime/packed.py`): memory does not grow, updates of a parameter
in place are seen, and a parameter replaced by another tensor is noticed and packed again.
Worth one launch and one read of ``x`` for each linear saved. Weights that are tied, not
plain parameters of the model, or not alone in their storage are left alone.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from dspark_compile.passes.base import Match, Pass, PassContext, Problem, dialect
from dspark_compile.passes.graph import dtype, emit, emit_getitem, is_dialect_op, order, shape
from dspark_compile.runtime.packed import PackedInput, stacked, why_not_shareable


class MergeLinears(Pass):
    """See the module's docstring."""

    name = "merge_linears"
    kind = "linear"
    stage = "optimise"

    def enabled(self, ctx: PassContext) -> bool:
        return ctx.options.merge_linears and super().enabled(ctx)

    def pattern(self, graph: fx.Graph, ctx: PassContext) -> Iterator[Match]:
        groups: dict[fx.Node, list[fx.Node]] = {}
        for node in graph.nodes:
            if is_dialect_op(node, "linear"):
                groups.setdefault(node.args[0], []).append(node)
        for nodes in groups.values():
            if len(nodes) > 1:
                yield Match(nodes[0], nodes)

    def check(self, match: Match, ctx: PassContext) -> Problem | None:
        placeholders = [n for n in match.anchor.graph.nodes if n.op == "placeholder"]
        columns = []
        for operand in (1, 2):
            nodes = [n.args[operand] if len(n.args) > operand else None for n in match.nodes]
            if operand == 2 and all(n is None for n in nodes):
                continue
            if operand == 2 and any(n is None for n in nodes):
                return Problem("some of the linears have a bias and some have none")
            indices = []
            tensors = []
            offset = 0
            for weight, linear in zip(nodes, match.nodes, strict=True):
                if not isinstance(weight, fx.Node) or weight.op != "placeholder":
                    return Problem("a weight is computed in the graph", node=linear)
                if len(weight.users) != 1:
                    return Problem("a weight is used elsewhere too", node=linear)
                index = placeholders.index(weight)
                if index >= len(ctx.example_inputs):
                    return Problem("a weight was added by another pass", node=linear)
                tensor = ctx.example_inputs[index]
                tensors.append(tensor)
                if offset * tensor.element_size() % 64:
                    return Problem("a stacked weight would not be aligned to 64 bytes", node=linear)
                offset += tensor.numel()
                indices.append(index)
            if stacked(tensors) is None:
                for tensor, linear in zip(tensors, match.nodes, strict=True):
                    reason = why_not_shareable(tensor)
                    if reason:
                        return Problem(reason, "leave merge_linears off for this model", linear)
            if len({dtype(n) for n in nodes}) != 1:  # type: ignore[arg-type]
                return Problem("the weights differ in dtype")
            columns.append((nodes, tuple(indices)))
        match.captures["columns"] = columns
        return None

    def rewrite(self, match: Match, graph: fx.Graph, ctx: PassContext) -> None:
        placeholders = [n for n in graph.nodes if n.op == "placeholder"]
        last = placeholders[-1]
        operands: list[fx.Node | None] = []
        for nodes, indices in match["columns"]:
            rows = sum(shape(n)[0] for n in nodes)
            with ctx.fake_mode:
                fake = torch.empty(
                    (rows, *shape(nodes[0])[1:]), dtype=dtype(nodes[0]),
                    device=nodes[0].meta["val"].device,
                )  # fmt: skip
            with graph.inserting_after(last):
                packed = graph.placeholder(f"packed_{nodes[0].name}")
            packed.meta["val"] = fake
            packed.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
            packed._dynamo_source = None  # type: ignore[attr-defined]
            ctx.extra_inputs.append(PackedInput(indices, fake))
            operands.append(packed)
            last = packed
        weight, bias = operands[0], operands[1] if len(operands) > 1 else None
        weights = match["columns"][0][0]
        position = order(graph)
        first = min(match.nodes, key=lambda n: position[n])
        with graph.inserting_before(first):
            merged = emit(
                graph,
                dialect("merged_linear"),
                (first.args[0], weight, bias, [shape(w)[0] for w in weights]),
                like=first,
                fake_mode=ctx.fake_mode,
            )
            items = [emit_getitem(graph, merged, i) for i in range(len(match.nodes))]
        for linear, item in zip(match.nodes, items, strict=True):
            linear.replace_all_uses_with(item)
            graph.erase_node(linear)
        ctx.raised("linear", merged)
