"""What ops mean that only move elements: an element of the result is one of an operand.

Views, slices, joins, pads, repeats and lookups: each answers by asking for another index. Where
the operand depends on the index (cat, pad, scatter), each piece is asked for under the
condition that it is the one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy
import torch
from sympy import Expr, Integer
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from dspark_compile.passes.graph import argument, known_equal
from dspark_compile.passes.mask_formulas import (
    FALSE,
    TRUE,
    Formula,
    Greatest,
    Unknown,
    conj,
    negate,
)
from dspark_compile.passes.mask_numbers import Value, choose
from dspark_compile.passes.mask_values import Interpreter, handles, recorded, size_expr


@handles("unsqueeze")
def _unsqueeze(run: Interpreter, node: fx.Node, index: tuple[Expr, ...]) -> Value:
    dim = node.args[1] % len(index)  # type: ignore[operator]
    return run.value(node.args[0], index[:dim] + index[dim + 1 :])  # type: ignore[arg-type]


@handles("view", "reshape", "_unsafe_view", "squeeze", "flatten", "unflatten", "view_copy")
def _reshape(run: Interpreter, node: fx.Node, index: tuple[Expr, ...]) -> Value:
    """Between dimensions of equal products the index is linearised and split again."""
    source: Any = node.args[0]
    if recorded(source).dtype != recorded(node).dtype:
        raise Unknown("reinterprets bits")
    inner = [size_expr(s) for s in recorded(source).shape]
    outer = [size_expr(s) for s in recorded(node).shape]
    result = [Integer(0)] * len(inner)
    i = j = 0
    while i < len(inner) or j < len(outer):
        if i < len(inner) and inner[i] == 1:
            i += 1
            continue
        if j < len(outer) and outer[j] == 1:
            j += 1
            continue
        if i == len(inner) or j == len(outer):
            raise Unknown("is reshaped in a way that cannot be followed")
        first, (left, right) = i, (inner[i], outer[j])
        linear, i, j = index[j], i + 1, j + 1
        while sympy.expand(left - right) != 0:
            step = left / right
            grow = step.is_Integer or (i == len(inner)) or not (right / left).is_Integer
            if grow and j < len(outer):
                linear = linear * outer[j] + index[j]
                right, j = right * outer[j], j + 1
            elif i < len(inner):
                left, i = left * inner[i], i + 1
            else:
                raise Unknown("is reshaped in a way that cannot be followed")
        for dim in range(i - 1, first, -1):
            if inner[dim] != 1:
                result[dim] = run.remainder(linear, inner[dim])
                linear = run.quotient(linear, inner[dim])
        result[first] = linear
    return run.value(source, tuple(result))


@handles("permute", "transpose", "t", "numpy_T")
def _permute(run: Interpreter, node: fx.Node, index: tuple[Expr, ...]) -> Value:
    rank = len(index)
    name = str(node.target)
    if "permute" in name:
        dims = [d % rank for d in node.args[1]]  # type: ignore[operator,union-attr]
    elif "transpose" in name:
        dims = list(range(rank))
        a, b = (d % rank for d in node.args[1:3])  # type: ignore[operator]
        dims[a], dims[b] = dims[b], dims[a]
    else:
        dims = list(reversed(range(rank)))
    result = [Integer(0)] * rank
    for position, dim in enumerate(dims):
        result[dim] = index[position]
    return run.value(node.args[0], tuple(result))  # type: ignore[arg-type]


def _from_start(run: Interpreter, start: Any, size: Any) -> Expr:
    """A slice's start counted from the front."""
    start = 0 if start is None else start
    value = recorded(start) if isinstance(start, fx.Node) else start
    expr = size_expr(value)
    if statically_known_true(value >= 0) or run.bounds(expr)[0] >= 0:
        return expr
    if statically_known_true(value < 0) or run.bounds(expr)[1] < 0:
        expr = expr + size_expr(size)
        known = statically_known_true(value + size >= 0) or run.bounds(expr)[0] >= 0
        return expr if known else Greatest(Integer(0), expr)
    raise Unknown("is sliced from a place of unknown sign")


@handles("slice")
def _slice(run: Interpreter, node: fx.Node, index: tuple[Expr, ...]) -> Value:
    source: Any = node.args[0]
    dim = argument(node, 1, "dim", 0) % len(index)
    start = _from_start(run, argument(node, 2, "start"), recorded(source).shape[dim])
    inner = start + size_expr(argument(node, 4, "step", 1)) * index[dim]
    return run.value(source, index[:dim] + (inner,) + index[dim + 1 :])


@handles("select")
def _select(run: Interpreter, node: fx.Node, index: tuple[Expr, ...]) -> Value:
    source: Any = node.args[0]
    dim = node.args[1] % (len(index) + 1)  # type: ignore[operator]
    place = _from_start(run, node.args[2], recorded(source).shape[dim])
    return run.value(source, index[:dim] + (place,) + index[dim:])


@handles("slice_scatter", "select_scatter")
def _scatter(run: Interpreter, node: fx.Node, index: tuple[Expr, ...]) -> Value:
    base, source = node.args[0], node.args[1]
    assert isinstance(base, fx.Node) and isinstance(source, fx.Node)
    dim = argument(node, 2, "dim", 0) % len(index)
    size = recorded(base).shape[dim]
    if "select" in str(node.target):
        place = _from_start(run, node.args[3], size)
        inside = run.eq(index[dim] - place)
        inner = index[:dim] + index[dim + 1 :]
    else:
        if argument(node, 5, "step", 1) != 1:
            raise Unknown("writes a slice with steps")
        start = _from_start(run, argument(node, 3, "start"), size)
        length = size_expr(recorded(source).shape[dim])
        inside = conj(run.le(start - index[dim]), run.le(index[dim] - start - length + 1))
        inner = index[:dim] + (index[dim] - start,) + index[dim + 1 :]
    return _pieces(run, [(inside, source, inner), (negate(inside), base, index)])


def _pieces(run: Interpreter, pieces: Sequence[tuple[Formula, fx.Node, tuple[Expr, ...]]]) -> Value:
    """The piece whose condition holds; conditions are exclusive and exhaustive."""
    possible = [p for p in pieces if p[0] != FALSE]
    if len(possible) == 1:
        return run.value(*possible[0][1:])
    values = [(c, run.anywhere(node, index)) for c, node, index in possible]
    result = values[-1][1]
    for condition, value in reversed(values[:-1]):
        result = choose(condition, value, result)
    return result


def _small(run: Interpreter, node: fx.Node, index: tuple[Expr, ...]) -> bool:
    """Whether the node itself can be a leaf, which is simpler than cases."""
    exact = recorded(node).dtype == torch.bool or not recorded(node).dtype.is_floating_point
    return exact and not run.depends_on_both(index)


@handles("cat")
def _cat(run: Interpreter, node: fx.Node, index: tuple[Expr, ...]) -> Value:
    if _small(run, node, index):
        return run.leaf(node, index)
    dim = argument(node, 1, "dim", 0) % len(index)
    dtype, offset, pieces = recorded(node).dtype, Integer(0), []
    before: Formula = TRUE
    for source in node.args[0]:  # type: ignore[union-attr]
        if recorded(source).dtype != dtype or recorded(source).dim() != len(index):
            raise Unknown("joins tensors of different kinds")
        end = offset + size_expr(recorded(source).shape[dim])
        inside = run.le(index[dim] - end + 1)
        inner = index[:dim] + (index[dim] - offset,) + index[dim + 1 :]
        pieces.append((conj(before, inside), source, inner))
        before, offset = conj(before, negate(inside)), end
    return _pieces(run, pieces)


@handles("constant_pad_nd")
def _pad(run: Interpreter, node: fx.Node, index: tuple[Expr, ...]) -> Value:
    if _small(run, node, index):
        return run.leaf(node, index)
    source: Any = node.args[0]
    pads = [size_expr(p) for p in node.args[1]]  # type: ignore[union-attr]
    inner, inside = list(index), []
    for n in range(len(pads) // 2):
        dim = len(index) - 1 - n
        inner[dim] = index[dim] - pads[2 * n]
        size = size_expr(recorded(source).shape[dim])
        inside += [run.le(-inner[dim]), run.le(inner[dim] - size + 1)]
    condition = conj(*inside)
    fill = run.literal(argument(node, 2, "value", 0), recorded(node).dtype)
    if condition == TRUE:
        return run.value(source, tuple(inner))
    value = run.anywhere(source, tuple(inner))
    return choose(condition, value, fill)


@handles("repeat")
def _repeat(run: Interpreter, node: fx.Node, index: tuple[Expr, ...]) -> Value:
    source: Any = node.args[0]
    size = recorded(source).shape
    own = index[len(index) - len(size) :]
    counts = node.args[1][len(index) - len(size) :]  # type: ignore[index]
    inner = [
        i if isinstance(c, int) and c == 1 else Integer(0) if known_equal(s, 1)
        else run.remainder(i, size_expr(s))
        for i, s, c in zip(own, size, counts)
    ]  # fmt: skip
    return run.value(source, tuple(inner))


@handles("index", "_unsafe_index")
def _index(run: Interpreter, node: fx.Node, index: tuple[Expr, ...]) -> Value:
    source, parts = node.args[0], list(node.args[1])  # type: ignore[arg-type]
    assert isinstance(source, fx.Node)
    size = recorded(source).shape
    parts += [None] * (len(size) - len(parts))
    used = [d for d, p in enumerate(parts) if p is not None]
    if any(recorded(p).dtype not in (torch.int32, torch.int64) for p in parts if p is not None):
        raise Unknown("is indexed with a mask")
    shapes = [recorded(parts[d]).shape for d in used]
    rank = max(len(s) for s in shapes)
    adjacent = used == list(range(used[0], used[-1] + 1))
    first = used[0] if adjacent else 0
    out = recorded(node).shape
    common, common_index = out[first : first + rank], index[first : first + rank]
    rest = iter(index[:first] + index[first + rank :])
    inner = [
        next(rest) if p is None
        else run.integer(p, run.broadcast(recorded(p).shape, common_index, common), size[d])
        for d, p in enumerate(parts)
    ]  # fmt: skip
    return run.value(source, tuple(inner))


@handles("index_select")
def _index_select(run: Interpreter, node: fx.Node, index: tuple[Expr, ...]) -> Value:
    source, dim, picks = node.args[:3]
    assert isinstance(source, fx.Node) and isinstance(picks, fx.Node)
    dim = dim % len(index)  # type: ignore[operator]
    own = (index[dim],) * recorded(picks).dim()
    place = run.integer(picks, own, recorded(source).shape[dim])
    return run.value(source, index[:dim] + (place,) + index[dim + 1 :])


@handles("gather")
def _gather(run: Interpreter, node: fx.Node, index: tuple[Expr, ...]) -> Value:
    source, dim, picks = node.args[:3]
    assert isinstance(source, fx.Node) and isinstance(picks, fx.Node)
    dim = dim % len(index)  # type: ignore[operator]
    place = run.integer(picks, index, recorded(source).shape[dim])
    return run.value(source, index[:dim] + (place,) + index[dim + 1 :])
