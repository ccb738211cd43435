"""Inputs that passes add to a graph: int4 weights, packed two numbers a byte."""

from __future__ import annotations

import torch
from torch import fx

from dspark_compile.ops.quantized import packed_shape
from dspark_compile.passes.base import PassContext
from dspark_compile.passes.graph import shape, val
from dspark_compile.runtime.packed_int4 import PackedInt4


def fits_4_bits(q: fx.Node) -> bool:
    """Whether the int8 numbers of the graph's input ``q`` are known to lie in -8 … 7."""
    return q.op == "placeholder" and q.meta.get("dspark_bits") == 4


def packed_fake(q: fx.Node, ctx: PassContext) -> torch.Tensor:
    """The value of the matrix ``q`` packed."""
    rows, columns = shape(q)
    with ctx.fake_mode:
        size = packed_shape(rows, columns)
        return torch.empty(size, dtype=torch.uint8, device=val(q).device)


def packed_input(q: fx.Node, ctx: PassContext) -> fx.Node:
    """The graph's input that holds its input ``q`` packed; one for all that read it."""
    known: dict[fx.Node, fx.Node] = ctx.shared.setdefault("packed_int4", {})
    if q in known:
        return known[q]
    placeholders = [n for n in q.graph.nodes if n.op == "placeholder"]
    fake = packed_fake(q, ctx)
    with q.graph.inserting_after(placeholders[-1]):
        made = q.graph.placeholder(f"{q.name}_packed")
    made.meta["val"] = fake
    made.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
    made._dynamo_source = None  # type: ignore[attr-defined]
    ctx.extra_inputs.append(PackedInt4(placeholders.index(q), fake))
    known[q] = made
    return made
