"""Normalise: one spelling for each ATen meaning, so that patterns can be short.

    t, transpose, numpy_T            -> permute
    _unsafe_view, reshape            -> view          (lowering prints reshape again)
    split, split_with_sizes, chunk, unbind + getitem, slice + squeeze -> slice / select
    square, pow(x, 2)                -> pow(x, 2)
    mul/add/sub/div.Scalar           -> .Tensor; neg-free rsub
    rsqrt written as reciprocal(sqrt), 1 / sqrt, pow(-0.5) -> rsqrt
    alias, detach, no-op clone, cast, slice, expand, view  -> removed
    x[a constant], x == a constant tensor -> select, x == number
    equal pure nodes                 -> one (common subexpressions)

A clone or alias whose value reaches an output or an input's ``copy_`` through views stays:
it decides what aliases what outside the graph.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from dspark_compile.passes.base import Match, Pass, PassContext
from dspark_compile.passes.graph import argument, aten, is_op, is_tensor, same_shape, shape, val

_VIEWS = (
    aten.copy.default,  # its value is its second argument
    aten.view.default,
    aten.permute.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.expand.default,
    aten.alias.default,
    aten.detach.default,
    aten.transpose.int,
    aten.t.default,
    aten._unsafe_view.default,
    aten.reshape.default,
)
_TO_TENSOR = {
    aten.mul.Scalar: aten.mul.Tensor,
    aten.add.Scalar: aten.add.Tensor,
    aten.sub.Scalar: aten.sub.Tensor,
    aten.div.Scalar: aten.div.Tensor,
}


def escapes(node: fx.Node) -> bool:
    """Whether ``node``'s storage is visible outside the graph."""
    for user in node.users:
        if user.op == "output" or is_op(user, aten.copy_.default):
            return True
        if is_op(user, *_VIEWS) and escapes(user):
            return True
    return False


def _noop(node: fx.Node) -> bool:
    """Whether a node returns its first argument unchanged."""
    source = node.args[0] if node.args else None
    if not (is_tensor(source) and is_tensor(node)):
        return False
    assert isinstance(source, fx.Node)
    a, b = val(source), val(node)
    if is_op(node, aten.alias, aten.detach, aten.lift_fresh_copy):
        return True
    if is_op(node, aten.clone, aten.contiguous):
        return True
    if is_op(node, aten._to_copy):
        return a.dtype == b.dtype and a.device == b.device
    if is_op(node, aten.view, aten.expand, aten.permute):
        same = same_shape(a.shape, b.shape)
        if is_op(node, aten.permute):
            return list(node.args[1]) == list(range(a.dim()))  # type: ignore[arg-type]
        return same
    if is_op(node, aten.slice.Tensor):
        start, step = argument(node, 2, "start"), argument(node, 4, "step", 1)
        return start in (0, None) and step == 1 and same_shape(a.shape, b.shape)
    if is_op(node, aten.squeeze):
        return a.dim() == b.dim()
    if is_op(node, aten.add.Tensor, aten.sub.Tensor) and a.dtype == b.dtype:
        other = node.args[1]
        return isinstance(other, (int, float)) and other == 0 and same_shape(a.shape, b.shape)
    if is_op(node, aten.mul.Tensor, aten.div.Tensor) and a.dtype == b.dtype:
        other = node.args[1]
        return isinstance(other, (int, float)) and other == 1 and same_shape(a.shape, b.shape)
    return False


class Normalize(Pass):
    """See the module's docstring."""

    name = "normalize"
    stage = "raise"

    def pattern(self, graph: fx.Graph, ctx: PassContext) -> Iterator[Match]:
        for node in list(graph.nodes):
            if node.op == "call_function" and node.users:
                yield Match(node)
        yield Match(next(iter(graph.nodes)), captures={"cse": True})

    def rewrite(self, match: Match, graph: fx.Graph, ctx: PassContext) -> None:
        if match.captures.get("cse"):
            common_subexpressions(graph)
            return
        node = match.anchor
        _respell(node, graph)
        if _noop(node) and not (
            is_op(node, aten.clone, aten._to_copy, aten.alias, aten.detach, aten.contiguous,
                  aten.lift_fresh_copy, aten.add, aten.mul, aten.sub, aten.div)
            and escapes(node)
        ):  # fmt: skip
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)

    def run(self, graph: fx.Graph, ctx: PassContext) -> Any:
        record = super().run(graph, ctx)
        # Every call counts as a match above; what matters is what changed.
        changed = sum(abs(n) for n in record.op_delta.values())
        record = replace(record, found=changed, rewritten=changed)
        ctx.report.passes[-1] = record
        return record


def _respell(node: fx.Node, graph: fx.Graph) -> None:
    source = node.args[0] if node.args else None
    if is_op(node, aten.t.default, aten.numpy_T.default) and isinstance(source, fx.Node):
        dims = list(reversed(range(val(source).dim())))
        node.target, node.args = aten.permute.default, (source, dims)
    elif is_op(node, aten.transpose.int) and isinstance(source, fx.Node):
        n = val(source).dim()
        dims = list(range(n))
        a, b = int(node.args[1]) % n, int(node.args[2]) % n  # type: ignore[arg-type]
        dims[a], dims[b] = dims[b], dims[a]
        node.target, node.args = aten.permute.default, (source, dims)
    elif is_op(node, aten.permute.default) and isinstance(source, fx.Node):
        n = val(source).dim()
        node.args = (source, [int(d) % n for d in node.args[1]])  # type: ignore[union-attr,arg-type]
    elif is_op(node, aten._unsafe_view.default, aten.reshape.default, aten.view.default):
        node.target = aten.view.default
        if isinstance(source, fx.Node) and all(isinstance(s, int) for s in shape(node)):
            node.args = (source, list(shape(node)))
    elif is_op(node, aten.slice.Tensor) and isinstance(source, fx.Node):
        _respell_slice(node, source)
    elif is_op(node, aten.squeeze.dim) and is_op(source, aten.slice.Tensor):
        _respell_squeeze(node, source)  # type: ignore[arg-type]
    elif is_op(node, aten.copy.default) and isinstance(node.args[1], fx.Node):
        old, new = val(node), val(node.args[1])
        same = same_shape(old.shape, new.shape) and old.dtype == new.dtype
        if same and old.device == new.device:
            node.target, node.args = aten.alias.default, (node.args[1],)
    elif node.target in _TO_TENSOR:
        node.target = _TO_TENSOR[node.target]
    elif is_op(node, aten.square.default) or (
        is_op(node, aten.mul.Tensor) and source is node.args[1]
    ):
        node.target, node.args = aten.pow.Tensor_Scalar, (source, 2)
    elif is_op(node, aten.pow.Tensor_Scalar) and node.args[1] == -0.5:
        node.target, node.args = aten.rsqrt.default, (source,)
    elif is_op(node, aten.pow.Tensor_Scalar) and node.args[1] == 0.5:
        node.target, node.args = aten.sqrt.default, (source,)
    elif is_op(node, aten.reciprocal.default) and is_op(source, aten.sqrt.default):
        node.target, node.args = aten.rsqrt.default, (source.args[0],)  # type: ignore[union-attr]
    elif is_op(node, operator.getitem):
        _respell_getitem(node)
    elif is_op(node, aten.index.Tensor) and len(node.args[1]) == 1:  # type: ignore[arg-type]
        _respell_index(node, graph)
    elif is_op(node, aten.eq.Tensor):
        for a, b in (node.args, node.args[::-1]):
            number = _filled(b)
            if number is not None and same_shape(shape(node), shape(a)):  # type: ignore[arg-type]
                node.target, node.args = aten.eq.Scalar, (a, number)
                break


def _filled(node: Any) -> int | None:
    """The number that the one element of ``node`` is; None: not known."""
    if not is_op(node, aten.full.default) or not is_tensor(node) or val(node).numel() != 1:
        return None
    return node.args[1] if type(node.args[1]) is int else None


def _respell_index(node: fx.Node, graph: fx.Graph) -> None:
    """``x[number]``, the number in a tensor of no or one dimension."""
    source, where = node.args[0], node.args[1][0]  # type: ignore[index]
    number = _filled(where)
    if number is None or val(where).dim() > 1 or not isinstance(source, fx.Node):
        return
    size = shape(source)[0]
    if not isinstance(size, int) or not -size <= number < size:
        return
    picked = (source, 0, number % size)
    if val(where).dim() == 0:
        node.target, node.args = aten.select.int, picked
        return
    with graph.inserting_before(node):
        one = graph.call_function(aten.select.int, picked)
    one.meta.update({k: v for k, v in node.meta.items() if k != "val"})
    with val(source).fake_mode:
        one.meta["val"] = val(source).select(0, number % size)
    node.target, node.args = aten.unsqueeze.default, (one, 0)


def _respell_slice(node: fx.Node, source: fx.Node) -> None:
    """Dimension, start and end as non-negative numbers, where the size is a number."""
    dim = int(argument(node, 1, "dim", 0)) % val(source).dim()
    size = shape(source)[dim]
    start, end = argument(node, 2, "start"), argument(node, 3, "end")
    step = argument(node, 4, "step", 1)
    start = 0 if start is None else start
    if isinstance(size, int) and isinstance(start, int) and isinstance(end, (int, type(None))):
        start, end, _ = slice(start, end).indices(size)
        end = max(start, end)
    node.args = (source, dim, start, end) if step == 1 else (source, dim, start, end, step)
    node.kwargs = {}


def _respell_squeeze(node: fx.Node, source: fx.Node) -> None:
    """One item of a dimension, sliced and squeezed (``x.chunk(n)[i].squeeze(0)``), is selected."""
    dim = int(argument(source, 1, "dim", 0)) % val(source).dim()
    start = argument(source, 2, "start", 0)
    one = shape(source)[dim] == 1 and isinstance(start, int) and start >= 0
    if one and int(node.args[1]) % val(source).dim() == dim:  # type: ignore[arg-type]
        node.target, node.args = aten.select.int, (source.args[0], dim, start)


def _respell_getitem(node: fx.Node) -> None:
    parent, index = node.args
    if not isinstance(parent, fx.Node) or not isinstance(index, int):
        return
    tensor = parent.args[0] if parent.args else None
    if not is_tensor(tensor):
        return
    assert isinstance(tensor, fx.Node)
    rank = val(tensor).dim()
    if is_op(parent, aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default):
        dim = int(argument(parent, 2, "dim", 0)) % rank
        pieces = [t.shape[dim] for t in parent.meta["val"]]
        if not all(isinstance(p, int) for p in pieces):
            return
        start = sum(pieces[:index])
        node.target = aten.slice.Tensor
        node.args = (tensor, dim, start, start + pieces[index])
    elif is_op(parent, aten.unbind.int):
        dim = int(argument(parent, 1, "dim", 0)) % rank
        node.target, node.args = aten.select.int, (tensor, dim, index)


_IMPURE = (
    aten.copy_.default,
    aten.rand.default,
    aten.randn.default,
    aten.bernoulli.default,
    aten.multinomial.default,
    aten.randint.default,
    aten.randperm.default,
    aten.rand_like.default,
    aten.randn_like.default,
)


def _key(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(_key(v) for v in value)
    if isinstance(value, dict):
        return tuple((k, _key(v)) for k, v in sorted(value.items()))
    if isinstance(value, (bool, float)):
        return (type(value), repr(value))
    return value


def common_subexpressions(graph: fx.Graph) -> int:
    """Merge equal pure calls; returns how many went.

    A fresh tensor (``empty``-like, or one that escapes) is never merged: two outputs that
    were distinct tensors stay distinct.
    """
    seen: dict[Any, fx.Node] = {}
    removed = 0
    for node in list(graph.nodes):
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        if node.target in _IMPURE or torch.Tag.nondeterministic_seeded in node.target.tags:
            continue
        if node.target._schema.is_mutable or "empty" in node.target._schema.name:
            continue
        try:
            key = (node.target, _key(node.args), _key(node.kwargs))
            first = seen.get(key)
        except TypeError:
            continue
        if first is None:
            seen[key] = node
        elif not (escapes(node) or escapes(first)):
            node.replace_all_uses_with(first)
            graph.erase_node(node)
            removed += 1
    return removed
