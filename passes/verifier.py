"""The verifier: what must hold of a graph between any two passes.

- every call is an ATen or dialect op, an operator on symbolic sizes, or a higher-order op
  that capture left alone;
- shapes and dtypes recorded on a node equal those of running it on its inputs' fakes;
- a node comes after its inputs;
- an input is written at most once, and nothing reads its old value after the write;
- no clone of a cache stands beside the cache in a mutating call (torch would fold
  ``op(clone(x), x)`` into ``op(x, x)``).
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from dspark_compile.passes.base import PassContext
from dspark_compile.passes.graph import aten, fake_call, is_op, known_equal


class VerifyError(AssertionError):
    """A pass left an illegal graph."""


_NAMESPACES = {"aten", "dspark", "dspark_triton", "prims", "higher_order"}
_PLAIN_MODULES = {"_operator", "math", "torch", "builtins", "torch.fx.experimental.symbolic_shapes"}


def verify(graph: fx.Graph, ctx: PassContext, after: str) -> None:
    """Raise `VerifyError` naming the pass and the node if the graph is illegal."""

    def fail(node: fx.Node, what: str) -> None:
        raise VerifyError(f"after pass {after!r}: {node.format_node()}: {what}")

    try:
        graph.lint()
    except RuntimeError as error:
        raise VerifyError(f"after pass {after!r}: {error}") from error
    written: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node.op != "call_function":
            if node.op not in ("placeholder", "output", "get_attr"):
                fail(node, f"{node.op} is not legal here")
            continue
        target = node.target
        if isinstance(target, torch._ops.OpOverload):
            if target.namespace not in _NAMESPACES and target._schema.is_mutable:
                fail(node, f"mutating op of the foreign namespace {target.namespace!r}")
        elif not isinstance(target, torch._ops.HigherOrderOperator):
            module = getattr(target, "__module__", None)
            if target is not operator.getitem and module not in _PLAIN_MODULES:
                fail(node, f"target {target!r} of module {module!r} is not legal here")
        _check_values(node, ctx, fail)
        _check_writes(node, written, fail)


def _check_values(node: fx.Node, ctx: PassContext, fail: Any) -> None:
    target = node.target
    if isinstance(target, torch._ops.OpOverload) and not target._schema.returns:
        return  # an assertion about sizes
    if "val" not in node.meta:
        fail(node, "has no fake value")
    if not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable:
        return
    if torch.Tag.dynamic_output_shape in target.tags or target is aten._local_scalar_dense.default:
        return
    try:
        got = fake_call(target, node.args, node.kwargs, ctx.fake_mode)
    except Exception as error:
        fail(node, f"its fake run raises {type(error).__name__}: {error}")
    want = node.meta["val"]
    pairs = list(zip(got, want, strict=False)) if isinstance(want, (tuple, list)) else [(got, want)]
    for g, w in pairs:
        if not isinstance(w, torch.Tensor):
            continue
        same = g.dim() == w.dim() and all(
            known_equal(a, b) or (target is aten.slice.Tensor and _data(a) and _data(b))
            for a, b in zip(g.shape, w.shape, strict=True)
        )
        if not same or g.dtype != w.dtype:
            fail(
                node,
                f"recorded as {w.dtype}{tuple(w.shape)}, runs to {g.dtype}{tuple(g.shape)}",
            )


def _data(size: Any) -> bool:
    """Whether a size is data: every run of a slice between bounds that are gives another symbol."""
    return not isinstance(size, int) and bool(free_unbacked_symbols(size))


def _check_writes(node: fx.Node, written: dict[fx.Node, fx.Node], fail: Any) -> None:
    for item in node.all_input_nodes:
        writer = written.get(item)
        if writer is not None and is_op(node, aten.copy_.default) and node.args[0] is item:
            fail(node, f"{item} is written twice (first by {writer})")
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or not target._schema.is_mutable:
        return
    for value, argument in zip(node.args, target._schema.arguments, strict=False):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        if isinstance(value, fx.Node):
            if value in written and value.op == "placeholder" and is_op(node, aten.copy_.default):
                fail(node, f"{value} is written twice (first by {written[value]})")
            for other in node.all_input_nodes:
                if is_op(other, aten.clone.default) and other.args[0] is value:
                    fail(node, f"a clone of {value} stands beside it")
            written[value] = node
