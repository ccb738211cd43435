"""Raise quantised weights: a product with whole numbers and their scales becomes a linear over
``dspark::dequantize_weight``.

    linear(x, (q.to(x.dtype) - zero) * scale)        torchao's groups; views split a row in groups
    mm(x, q.to(x.dtype).t()) * scale                 torchao's int8 rows; F.linear(x, q.to(...)) * s
    _weight_int8pack_mm(x, q, scale)
        -> linear(x, dequantize_weight(q, scale, zero))

``q`` is an int8 matrix ``[N, K]``; scale and zero point are inputs of the graph with one value for
each row or for each group of a row. Casts of scales between floating types are dropped: the dialect
rounds at most as often as eager code. torchao leaves views behind a product that flatten it and
restore it; they go, since the passes that follow look for the product itself.

Worth nothing by itself: `raise_mlp` sees ordinary linears, and `fuse_dequantize_weight` then joins
weights and products so that only the numbers are read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from dspark_compile.passes.base import Match, Pass, PassContext, Problem, dialect
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

_DEPTH = 12
_RESHAPES = (*VIEWS, aten.unsqueeze.default, aten.squeeze.dim)


@dataclass(frozen=True)
class Weight:
    """``(q - zero) * scale`` as an expression of the graph spells it.

    Attributes:
        q: the numbers, int8 ``[N, K]``.
        scale: ``[N]``, ``[N, 1]`` or ``[N, G]``; None where there is none (yet).
        zero: of ``N`` or ``N * G`` values; None for none.
        groups: how many groups a row is split in at this point of the expression; 0 for no split.
        transposed: whether the expression is ``[K, N]`` at this point.
    """

    q: fx.Node
    scale: fx.Node | None = None
    zero: fx.Node | None = None
    groups: int = 0
    transposed: bool = False


class _Unknown(Exception):
    """An expression of whole numbers is not one of a quantised weight; the message says why."""


class RaiseQuantized(Pass):
    """See the module's docstring."""

    name = "raise_quantized"
    kind = "linear"
    stage = "raise"

    def pattern(self, graph: fx.Graph, ctx: PassContext) -> Iterator[Match]:
        for node in list(graph.nodes):
            if is_op(node, aten._weight_int8pack_mm.default):
                x, q, scale = node.args
                yield Match(node, [node], {"x": x, "weight": Weight(q, scale), "packed": True})
                continue
            operand = _operand(node)
            if operand is None or not _of_integers(node.args[operand]):
                continue
            match = Match(node, [node], {"operand": operand})
            try:
                self._read(match, operand)
            except _Unknown as error:
                match.captures["problem"] = Problem(str(error), "", node)
            yield match

    def _read(self, match: Match, operand: int) -> None:
        node = match.anchor
        weight = read(node.args[operand])
        if weight.transposed != (not is_dialect_op(node, "linear")) or weight.groups:
            raise _Unknown("the weight is stored [in, out]: its rows are not contiguous")
        if weight.scale is None:
            if weight.zero is not None:
                raise _Unknown("the weight has zero points and no scale")
            scaled, weight = _scaled_after(node, weight)
            match.captures["scaled"] = scaled
        match.captures["weight"] = weight

    def check(self, match: Match, ctx: PassContext) -> Problem | None:
        return match.captures.get("problem")

    def rewrite(self, match: Match, graph: fx.Graph, ctx: PassContext) -> None:
        node, weight = match.anchor, match["weight"]
        kind = dtype(node)
        graph.inserting_before(node)

        def make(target: Any, *args: Any) -> fx.Node:
            return emit(graph, target, args, like=node, fake_mode=ctx.fake_mode)

        whole = make(dialect("dequantize_weight"), weight.q, weight.scale, weight.zero, kind)
        if "packed" in match.captures:
            node.replace_all_uses_with(make(dialect("linear"), match["x"], whole, None))
            return
        if not is_dialect_op(node, "linear"):
            whole = make(aten.permute.default, whole, [1, 0])
        node.update_arg(match["operand"], whole)
        scaled = match.captures.get("scaled")
        if scaled is not None:
            # Only views stand between the product and its scale.
            below = scaled.args[0] if _leads(scaled.args[0], node) else scaled.args[1]
            scaled.replace_all_uses_with(below)
            graph.erase_node(scaled)

    def run(self, graph: fx.Graph, ctx: PassContext) -> Any:
        record = super().run(graph, ctx)
        if record.rewritten:
            drop_round_trips(graph)
            graph.eliminate_dead_code()
        return record


def _operand(node: fx.Node) -> int | None:
    """Which argument of a product is its weight."""
    if is_dialect_op(node, "linear") or is_op(node, aten.mm.default):
        return 1
    return 2 if is_op(node, aten.addmm.default) else None


def _of_integers(node: Any) -> bool:
    """Whether a weight is computed from a matrix of small integers."""
    for _ in range(_DEPTH):
        if not is_tensor(node):
            return False
        if dtype(node) in (torch.int8, torch.uint8):
            return True
        if node.op != "call_function" or is_dialect_op(node):
            return False
        if is_op(node, aten.mul.Tensor, aten.add.Tensor) and _of_integers(node.args[1]):
            return True
        node = node.args[0] if node.args else None
    return False


# -- reading a weight


def read(node: Any) -> Weight:
    """The weight that ``node`` computes.

    Raises:
        _Unknown: it is not made of int8 numbers in the way of the module's docstring.
    """
    if is_tensor(node) and dtype(node) == torch.int8 and val(node).dim() == 2:
        if node.op != "call_function":
            return Weight(node)
    if is_op(node, aten._to_copy.default):
        source = node.args[0]
        narrow = dtype(node) in (torch.int8, torch.uint8)
        if narrow or not (dtype(source) == torch.int8 or dtype(source).is_floating_point):
            raise _Unknown(f"the weight is cast from {dtype(source)} to {dtype(node)}")
        return read(source)
    if is_op(node, *VIEWS):
        return _viewed(read(node.args[0]), node)
    if is_op(node, aten.permute.default):
        weight = read(node.args[0])
        if list(node.args[1]) != [1, 0] or weight.groups:
            raise _Unknown("the weight's groups are permuted")
        return replace(weight, transposed=not weight.transposed)
    if is_op(node, aten.sub.Tensor) and not node.kwargs:
        weight = read(node.args[0])
        if weight.scale is not None or weight.zero is not None:
            raise _Unknown("zero points are subtracted after the scale")
        return replace(weight, zero=_parameter(node.args[1], weight, "zero points"))
    if is_op(node, aten.mul.Tensor):
        left, right = node.args
        if not _of_integers(left):
            left, right = right, left
        weight = read(left)
        if weight.scale is not None:
            raise _Unknown("the weight is scaled twice")
        return replace(weight, scale=_parameter(right, weight, "scales"))
    if is_tensor(node) and dtype(node) == torch.uint8:
        raise _Unknown("the weight is stored in uint8: only int8 matrices are known")
    what = getattr(node, "target", node)
    raise _Unknown(f"the weight is made of integers with {what}, not as (q - zero) * scale")


def _viewed(weight: Weight, node: fx.Node) -> Weight:
    """A view that splits rows in groups, or joins them again."""
    n, k = shape(weight.q)
    sizes = shape(node)
    if weight.transposed:
        raise _Unknown("the weight is viewed after it was transposed")
    if same_shape(sizes, (n, k)):
        return replace(weight, groups=0)
    whole = len(sizes) == 3 and known_equal(sizes[0], n) and all(isinstance(s, int) for s in sizes)
    if not whole or sizes[1] * sizes[2] != k:
        raise _Unknown(f"the weight of {n} rows is viewed as {list(sizes)}")
    return replace(weight, groups=sizes[1])


def _parameter(node: Any, weight: Weight, what: str) -> fx.Node:
    """The tensor of scales or zero points behind ``node``, which is broadcast over a weight."""
    n = shape(weight.q)[0]
    if not is_tensor(node):
        raise _Unknown(f"the {what} are a number")
    if weight.groups:
        fits = same_shape(shape(node), (n, weight.groups, 1))
    elif weight.transposed:
        fits = same_shape(shape(node), (n,)) or same_shape(shape(node), (1, n))
    else:
        fits = same_shape(shape(node), (n, 1))
    if not fits:
        raise _Unknown(f"the {what} are {list(shape(node))}: not one for each row or group")
    return _base(node, what)


def _base(node: Any, what: str) -> fx.Node:
    """The input behind ``node``, through casts and reshapes."""
    while is_op(node, aten._to_copy.default, *_RESHAPES):
        below = node.args[0]
        if dtype(node).is_floating_point != dtype(below).is_floating_point:
            if dtype(below) != torch.int8 or not dtype(node).is_floating_point:
                raise _Unknown(f"the {what} are cast from {dtype(below)} to {dtype(node)}")
        node = below
    if node.op not in ("placeholder", "get_attr"):
        raise _Unknown(f"the {what} are computed in the graph")
    return node


# -- a scale behind the product


def _scaled_after(node: fx.Node, weight: Weight) -> tuple[fx.Node, Weight]:
    """The multiplication of a product's columns, and the weight with these scales."""
    if is_op(node, aten.addmm.default) or argument(node, 2, "bias") is not None:
        raise _Unknown("a bias is added before the scale")
    below = node
    for _ in range(_DEPTH):
        if len(below.users) != 1:
            raise _Unknown("the product is used before it is scaled")
        (user,) = below.users
        if is_op(user, aten.mul.Tensor):
            break
        if not is_op(user, *VIEWS) or not known_equal(shape(user)[-1], shape(below)[-1]):
            raise _Unknown("the weight has no scale")
        below = user
    other = user.args[1] if user.args[0] is below else user.args[0]
    if not is_tensor(other) or other is below:
        raise _Unknown("the product is scaled by a number")
    n = shape(weight.q)[0]
    sizes = shape(other)
    if not sizes or not known_equal(sizes[-1], n) or any(s != 1 for s in sizes[:-1]):
        raise _Unknown(f"the product is scaled by {list(sizes)}: not one number for each column")
    if dtype(user) != dtype(below) or not same_shape(shape(user), shape(below)):
        raise _Unknown(f"the scale turns {dtype(below)} into {dtype(user)}")
    return user, replace(weight, scale=_base(other, "scales"))


def _leads(node: Any, product: fx.Node) -> bool:
    while is_op(node, *VIEWS):
        node = node.args[0]
    return node is product


def drop_round_trips(graph: fx.Graph) -> None:
    """Views that lead back to the shape of a value they began with become that value."""
    for node in list(graph.nodes):
        below = node
        while is_op(below, *VIEWS):
            below = below.args[0]
            if same_shape(shape(node), shape(below)) and not _returned(node):
                node.replace_all_uses_with(below)
                break


def _returned(node: fx.Node) -> bool:
    return any(u.op == "output" or is_op(u, aten.copy_.default) for u in node.users)
