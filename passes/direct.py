"""Whether a graph needs an inner compiler at all.

Where every heavy node of a graph is a C++ kernel of ours or a product of the vendor's library, all
that Inductor adds is to fuse what little lies between them, for tens of seconds. Such a graph runs
as it is: its kernels and ATen's, called one after another.

Condition: what running the graph as it is would cost more, by the cost model, is at most `SHARE` of
its predicted time. That is one call for each node that Inductor would have fused away and what
such nodes read and write. Anything that is not counted with certainty (dynamic sizes, ops with
neither a kernel nor a known cost) is left to Inductor, and the report says what it was.

Worth: a prompt of Qwen3-0.6B's shape compiles in the time that its few kernels take to build.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from dspark_compile.codegen import cost, machine
from dspark_compile.codegen.cpp import build, emit, isa
from dspark_compile.codegen.cpp.plan import VIEWS
from dspark_compile.kernels import cpp
from dspark_compile.passes.base import PassContext, dialect
from dspark_compile.passes.graph import aten, dialect_name, is_dialect_op
from dspark_compile.passes.graph import emit as emit_node

SHARE = 0.05
CALL = 3e-6  # seconds of one more ATen call, less what a fused kernel's call takes

# Products that Inductor too leaves to the library.
_PRODUCTS = frozenset(
    {
        aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default,
        aten.matmul.default, aten.linear.default, aten.convolution.default,
        aten.scaled_dot_product_attention.default,
    }
)  # fmt: skip
# Dialect ops whose ATen form is products of the library, and how often each element of the tensor
# between them is read or written more than in fused code.
_LIBRARY = {
    "linear": 0, "merged_linear": 0, "matmul": 0, "mlp": 2, "gated_mlp": 3, "gated_mlp_merged": 3,
}  # fmt: skip
# A cache that the graph itself makes: the first call of a static cache.
_FRESH = frozenset(
    {
        aten.zeros.default, aten.full.default, aten.zeros_like.default, aten.full_like.default,
        aten.new_zeros.default, aten.new_full.default,
    }
)  # fmt: skip
_GATHERS = frozenset({aten.embedding.default, aten.index_select.default, aten.index.Tensor})


class _Unknown(Exception):
    """What a node costs cannot be said; the message says why."""


@dataclass
class _Count:
    """Seconds that a graph is predicted to take, and those that Inductor would save."""

    total: float = 0.0
    extra: float = 0.0
    kernels: list[emit.Source] = field(default_factory=list)


def why_not(module: fx.GraphModule, ctx: PassContext) -> str | None:
    """Why Inductor is worth its time on ``module``; None if the graph may run as it is.

    With None, every kernel that lowering will choose has been built, several at a time.
    """
    if not any(is_dialect_op(n) for n in module.graph.nodes):
        return "no kernel of ours takes part"
    try:
        count = _Count()
        known = machine.describe()
        for node in module.graph.nodes:
            if node.op == "call_function":
                _add(node, count, known)
            elif node.op not in ("placeholder", "output"):
                raise _Unknown(f"{node.name} is {node.op}")
        share = count.extra / max(count.total, 1e-9)
        if share > SHARE:
            return f"fusing what lies between kernels saves {share:.0%} of the predicted time"
        emit.build_all(count.kernels, isa.detect())
    except (_Unknown, build.BuildError, ValueError) as error:
        return str(error)
    return None


def write_fresh_in_place(graph: fx.Graph, ctx: PassContext) -> None:
    """Appends to caches that the graph makes write them; each gets one of its own."""
    for node in list(graph.nodes):
        if not _appends_to_fresh(node):
            continue
        with graph.inserting_before(node):
            cache = graph.node_copy(node.args[0])
            args = (cache, *node.args[1:])
            write = emit_node(
                graph, dialect("cache_append_"), args, like=node, fake_mode=ctx.fake_mode
            )
        node.replace_all_uses_with(cache)
        graph.erase_node(node)
        ctx.report.rename_site(node.name, write.name, "cache_append_")
    graph.eliminate_dead_code()


def _appends_to_fresh(node: fx.Node) -> bool:
    cache = node.args[0] if is_dialect_op(node, "cache_append") else None
    return isinstance(cache, fx.Node) and cache.target in _FRESH


def _add(node: fx.Node, count: _Count, known: machine.Machine) -> None:
    if node.target is operator.getitem or node.target in VIEWS:
        return
    for value in _tensors(node):
        if not all(isinstance(n, int) for n in (*value.shape, *value.stride())):
            raise _Unknown(f"{node.name} has a dynamic size, {list(value.shape)}")
    if is_dialect_op(node):
        _add_dialect(node, count, known)
        return
    if node.target in _PRODUCTS:
        count.total += _moved(node) / known.bandwidth
        return
    seconds = CALL + _moved(node) / max(known.copy.values())
    count.total += seconds
    count.extra += seconds


def _add_dialect(node: fx.Node, count: _Count, known: machine.Machine) -> None:
    name = dialect_name(node)
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    try:
        count.total += cost.of_node(node).seconds(known)
    except (KeyError, ValueError) as error:
        raise _Unknown(f"the cost of {name} is not known: {error}") from None
    with emit.deferred(count.kernels):
        written = "cache_append_" if _appends_to_fresh(node) else name
        reason = cpp.supports(written, *args, **kwargs)
    if reason is None:
        return
    if name == "attention" and _is_sdpa(args, kwargs):
        return
    if name not in _LIBRARY:
        raise _Unknown(f"{name} at {node.name}: {reason}")
    if _LIBRARY[name]:
        x, up = args[0], args[2] if name == "gated_mlp" else args[1]
        rows = x.numel() // x.shape[-1]
        between = rows * up.shape[0] * x.element_size() * _LIBRARY[name]
        count.extra += between / max(known.copy.values()) + CALL


def _is_sdpa(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether the ATen form is one call of ``scaled_dot_product_attention``, with no mask made."""
    masked = kwargs.get("mask", "") not in ("", "k <= q") or kwargs.get("mask_value") is not None
    more = any(x is not None for x in args[3:5]) or kwargs.get("softcap", 0.0) > 0
    return not masked and not more


def _tensors(node: fx.Node) -> Iterator[Tensor]:
    value = node.meta.get("val")
    for item in value if isinstance(value, (list, tuple)) else [value]:
        if isinstance(item, Tensor):
            yield item
        elif isinstance(item, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            raise _Unknown(f"{node.name} is a dynamic size")


def _moved(node: fx.Node) -> int:
    """Bytes that the node reads and writes."""
    written = sum(t.numel() * t.element_size() for t in _tensors(node))
    if node.target in _GATHERS:
        return 2 * written
    read: dict[Any, int] = {}
    for item in node.all_input_nodes:
        for t in _tensors(item):
            expanded = t.stride().count(0) > 0
            read[item] = t.untyped_storage().nbytes() if expanded else t.numel() * t.element_size()
    return written + sum(read.values())
