"""Raise linears: matrix products with a parameter become ``dspark::linear``.

    view(addmm(bias, view(x), W))      Conv1D of GPT-2: W is [in, out]
    view(mm(view(x), permute(W)))      x @ W.T
    linear(x, W) + bias                a bias added by hand

Capture keeps ``F.linear`` whole; this catches what was written as a product. ``W`` becomes
``permute(W)``, a view: nothing is copied. Conditions: the right operand is an input of the
graph (through casts or transposition), and the views only flatten and restore the leading
dimensions.

Worth: nothing by itself; later passes (MLP, merged linears) look only for the dialect op.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import fx

from dspark_compile.passes.base import Match, Pass, PassContext, dialect
from dspark_compile.passes.graph import (
    VIEWS,
    argument,
    aten,
    dtype,
    emit,
    is_dialect_op,
    is_op,
    is_tensor,
    known_equal,
    same_shape,
    shape,
    val,
)


class RaiseLinear(Pass):
    """See the module's docstring."""

    name = "raise_linear"
    kind = "linear"
    stage = "raise"

    def pattern(self, graph: fx.Graph, ctx: PassContext) -> Iterator[Match]:
        for node in list(graph.nodes):
            if is_op(node, aten.mm.default) and is_parameter(node.args[1]):
                yield _product(node, node.args[0], node.args[1], None)
            elif is_op(node, aten.addmm.default) and is_parameter(node.args[2]):
                bias = node.args[0]
                plain = argument(node, 3, "beta", 1) == 1 and argument(node, 4, "alpha", 1) == 1
                if plain and is_tensor(bias) and val(bias).dim() == 1:
                    yield _product(node, node.args[1], node.args[2], bias)
        for node in list(graph.nodes):
            match = _biased(node)
            if match is not None:
                yield match

    def rewrite(self, match: Match, graph: fx.Graph, ctx: PassContext) -> None:
        node, weight = match.anchor, match["weight"]
        graph.inserting_before(node)

        def make(target: Any, *args: Any) -> fx.Node:
            return emit(graph, target, args, like=node, fake_mode=ctx.fake_mode)

        if not match["transposed"]:
            swapped = is_op(weight, aten.permute.default) and list(weight.args[1]) == [1, 0]
            weight = weight.args[0] if swapped else make(aten.permute.default, weight, [1, 0])
        new = make(dialect("linear"), match["x"], weight, match["bias"])
        node.replace_all_uses_with(new)


def is_parameter(node: Any) -> bool:
    """Whether ``node`` is an input of the graph, cast, transposed, viewed, dequantised or not."""
    kinds = (aten.permute.default, aten._to_copy.default, aten.select.int, *VIEWS)
    kinds = (*kinds, dialect("dequantize_weight"))
    while is_op(node, *kinds):
        node = node.args[0]
    return isinstance(node, fx.Node) and node.op in ("placeholder", "get_attr")


def _product(node: fx.Node, flat: Any, weight: Any, bias: Any) -> Match:
    """The match at ``node``, or at the one view that restores the leading dimensions."""
    captures = {"x": flat, "weight": weight, "bias": bias, "transposed": False}
    users = list(node.users)
    if len(users) == 1 and is_op(users[0], *VIEWS) and is_op(flat, *VIEWS):
        x = flat.args[0]
        restored = shape(users[0])
        same_last = shape(x) and known_equal(shape(x)[-1], shape(flat)[-1])
        if same_last and known_equal(restored[-1], shape(node)[-1]):
            if same_shape(restored[:-1], shape(x)[:-1]):
                return Match(users[0], [node, flat], {**captures, "x": x})
    return Match(node, captures=captures)


def _biased(node: fx.Node) -> Match | None:
    """``linear(x, W) + b`` with a parameter ``b`` of one dimension."""
    if not is_op(node, aten.add.Tensor) or node.kwargs:
        return None
    for product, bias in (node.args, tuple(reversed(node.args))):
        if not is_dialect_op(product, "linear") or len(product.users) != 1:  # type: ignore[union-attr]
            continue
        if not is_tensor(bias) or not is_parameter(bias):
            continue
        fits = val(bias).dim() == 1 and known_equal(shape(bias)[0], shape(product)[-1])  # type: ignore[arg-type]
        if fits and dtype(bias) == dtype(product) == dtype(node):  # type: ignore[arg-type]
            x, weight = product.args[:2]  # type: ignore[union-attr]
            if argument(product, 2, "bias") is None:  # type: ignore[arg-type]
                captures = {"x": x, "weight": weight, "bias": bias, "transposed": True}
                return Match(node, [product], captures)  # type: ignore[list-item]
    return None
