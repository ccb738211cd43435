"""Rules of `dspark_compile.passes.incremental` for views, slices and joins."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from dspark_compile.passes.graph import VIEWS, aten
from dspark_compile.passes.incremental_core import (
    ALL,
    NEW,
    Maker,
    Mode,
    Modes,
    NotIncremental,
    Rows,
    rule,
)


@rule(*VIEWS)
def view(maker: Maker, node: fx.Node, modes: Modes, value: Tensor) -> fx.Node:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    own = _view_modes(maker, source, source.meta["val"].shape, value.shape, modes)
    sizes = [maker.size(n, modes[d]) for d, n in enumerate(value.shape)]
    return maker.graph.call_function(aten.reshape.default, (maker.get(source, own), sizes))


def _view_modes(
    maker: Maker, source: fx.Node, before: Sequence[Any], after: Sequence[Any], modes: Modes
) -> Modes:
    """Modes of a view's source: dimensions are matched in groups of equal size."""
    expression = lambda n: n.node.expr if isinstance(n, torch.SymInt) else sympy.Integer(n)  # noqa: E731
    own: list[Mode] = [None] * len(before)
    i = j = 0
    while i < len(before) or j < len(after):
        left: list[int] = []
        right: list[int] = []
        a = b = sympy.Integer(1)
        while True:
            if i < len(before) and (not left or (a != b and not _less(b, a))):
                left.append(i)
                a *= expression(before[i])
                i += 1
            elif j < len(after) and (not right or a != b):
                right.append(j)
                b *= expression(after[j])
                j += 1
            else:
                break
            if left and right and a == b:
                break
            if i == len(before) and j == len(after):
                break
        if sympy.expand(a - b) != 0:
            raise NotIncremental(f"{source.name}: its view cannot be followed")
        wanted = {modes[d] for d in right if modes[d] is not None}
        carrying = [d for d in left if maker.carries(before[d])]
        if len(wanted) > 1 or len(carrying) > 1:
            raise NotIncremental(f"{source.name}: a view joins two sequences")
        if wanted and not carrying:
            raise NotIncremental(f"{source.name}: a view of the first rows of the sequence")
        for d in carrying:
            if not wanted:
                raise NotIncremental(f"{source.name}: a view hides the sequence")
            own[d] = next(iter(wanted))
    return tuple(own)


def _less(a: sympy.Expr, b: sympy.Expr) -> bool:
    """Whether a is surely smaller: both are products of a number and maybe S."""
    ratio = sympy.simplify(b / a)
    return bool(ratio.is_number and ratio > 1) or (
        not ratio.is_number and bool(ratio.has(sympy.Symbol)) and sympy.denom(ratio).is_number
    )


@rule(aten.permute.default, aten.transpose.int, aten.t.default)
def permute(maker: Maker, node: fx.Node, modes: Modes, value: Tensor) -> fx.Node:
    source = node.args[0]
    rank = len(modes)
    if node.target is aten.permute.default:
        order = [d % rank for d in node.args[1]]  # type: ignore[union-attr]
    else:
        a, b = (node.args[1], node.args[2]) if len(node.args) > 2 else (0, 1)
        order = list(range(rank))
        if rank > 1:
            order[a % rank], order[b % rank] = order[b % rank], order[a % rank]  # type: ignore[operator]
    own: list[Mode] = [None] * rank
    for d, s in enumerate(order):
        own[s] = modes[d]
    return maker.emit(node, (maker.get(source, tuple(own)), *node.args[1:]))


@rule(aten.unsqueeze.default)
def unsqueeze(maker: Maker, node: fx.Node, modes: Modes, value: Tensor) -> fx.Node:
    d = node.args[1] % value.dim()  # type: ignore[operator]
    return maker.emit(node, (maker.get(node.args[0], modes[:d] + modes[d + 1 :]), d))


@rule(aten.squeeze.dim, aten.squeeze.dims)
def squeeze(maker: Maker, node: fx.Node, modes: Modes, value: Tensor) -> fx.Node:
    source = node.args[0].meta["val"]  # type: ignore[union-attr]
    dims = node.args[1] if isinstance(node.args[1], (list, tuple)) else [node.args[1]]
    gone = {d % source.dim() for d in dims if source.shape[d] == 1}  # type: ignore[index]
    left = iter(modes)
    own = tuple(None if d in gone else next(left) for d in range(source.dim()))
    return maker.emit(node, (maker.get(node.args[0], own), *node.args[1:]))


@rule(aten.expand.default)
def expand(maker: Maker, node: fx.Node, modes: Modes, value: Tensor) -> fx.Node:
    sizes = [maker.size(n, modes[d]) for d, n in enumerate(value.shape)]
    return maker.emit(node, (maker.operand(node.args[0], modes), sizes))


@rule(aten.repeat.default)
def repeat(maker: Maker, node: fx.Node, modes: Modes, value: Tensor) -> fx.Node:
    """Streams of the residual, say: what is repeated is not the sequence."""
    source, times = node.args
    assert isinstance(source, fx.Node) and isinstance(times, (list, tuple))
    shape = source.meta["val"].shape
    lead = len(times) - len(shape)
    numbers = [maker.number(n) for n in times]
    if None in numbers or any(
        maker.carries(n) and numbers[lead + d] != 1 for d, n in enumerate(shape)
    ):
        raise NotIncremental(f"{node.name}: it repeats the sequence")
    return maker.emit(node, (maker.get(source, modes[lead:]), numbers))


@rule(aten.slice.Tensor)
def slice_(maker: Maker, node: fx.Node, modes: Modes, value: Tensor) -> fx.Node:
    source, dim, start, _, step = [*node.args, *(0, None, None, 1)[len(node.args) - 1 :]][:5]
    assert isinstance(source, fx.Node)
    before = source.meta["val"].shape
    dim = dim % len(before)  # type: ignore[operator]
    start = 0 if start is None else start
    if not maker.carries(before[dim]) and not maker.carries(value.shape[dim]):
        return maker.emit(node, (maker.get(source, modes), *node.args[1:]))
    known = _start(maker, start, before[dim])
    mode = modes[dim]
    if maker.carries(value.shape[dim]) and not maker.carries(before[dim]):
        # The first S rows of a table.
        more = maker.more(value.shape[dim])
        if step != 1 or more is None:
            raise NotIncremental(f"{node.name}: a part of a table that is not the first rows")
        if known is None or known < 0:
            raise NotIncremental(f"{node.name}: its start depends on the length")
        rows = int(before[dim]) - known - more
        maker.limit = rows if maker.limit is None else min(maker.limit, rows)
        own: Modes = tuple(None if d == dim else m for d, m in enumerate(modes))
        table = maker.get(source, own)
        if isinstance(mode, Rows):
            at = maker.at(mode)
            if known:
                at = maker.graph.call_function(aten.add.Tensor, (at, known))
            return maker.graph.call_function(aten.index_select.default, (table, dim, at))
        stop = maker.graph.call_function(operator.add, (maker.N(), known + more))
        return maker.graph.call_function(aten.slice.Tensor, (table, dim, known, stop))
    last = maker.pure(before[dim]) and _row(maker, start) == -1 and step == 1
    if last and not maker.carries(value.shape[dim]) and maker.takes_last(node):
        own = (*modes[:dim], NEW, *modes[dim + 1 :])
        x = maker.get(source, own)
        return x if maker.every else maker.emit(node, (x, dim, -1))
    if step != 1 or known is None or known < 0 or maker.more(before[dim]) is None:
        raise NotIncremental(f"{node.name}: a slice of the sequence")
    if isinstance(mode, Rows):
        return _from_row(maker, source, modes, dim, known)
    if mode == ALL:
        more = maker.more(value.shape[dim])
        if more is None:
            raise NotIncremental(f"{node.name}: a slice of the sequence")
        made = maker.get(source, modes)
        if not known and maker.more(before[dim]) == more:
            return made  # all of it
        stop = maker.graph.call_function(operator.add, (maker.N(), known + more))
        return maker.graph.call_function(aten.slice.Tensor, (made, dim, known, stop))
    if value.shape[dim] == 1 and known == 0 and maker.dependent[source]:
        return maker.first_row(source, modes, dim)
    raise NotIncremental(f"{node.name}: some rows of the sequence, wherever the token stands")


def _from_row(maker: Maker, source: fx.Node, modes: Modes, dim: int, first: int) -> fx.Node:
    """``source`` from row ``first`` on. What is rolled is known behind the rows that came round."""
    mode = modes[dim]
    assert isinstance(mode, Rows)
    source, shift = unrolled(maker, source, dim, first)
    return maker.get(source, (*modes[:dim], mode.back(shift - first), *modes[dim + 1 :]))


def unrolled(maker: Maker, node: fx.Node, dim: int, hidden: int) -> tuple[fx.Node, int]:
    """``(x, shift)``: ``node`` is ``x`` with each row ``shift`` further back, but for the first
    ``hidden`` ones."""
    base: Any = node
    while isinstance(base, fx.Node) and base.target in (aten.clone.default, aten.alias.default):
        base = base.args[0]
    if not isinstance(base, fx.Node) or base.target is not aten.roll.default:
        return node, 0
    x, shifts, dims = [*base.args, []][:3]
    rank = base.meta["val"].dim()
    if not isinstance(x, fx.Node) or [d % rank for d in dims] != [dim]:  # type: ignore[union-attr]
        return node, 0
    shift = shifts[0]  # type: ignore[index]
    return (x, shift) if isinstance(shift, int) and 0 <= shift <= hidden else (node, 0)


def _start(maker: Maker, start: Any, size: Any) -> int | None:
    """The row that a slice begins at; None: it depends on the length."""
    value = start.meta["val"] if isinstance(start, fx.Node) else start
    number = value.node.expr if isinstance(value, torch.SymInt) else sympy.Integer(value)
    if isinstance(size, torch.SymInt) and (number.is_negative or number.coeff(maker.symbol, 1) < 0):
        number = sympy.expand(number + size.node.expr)
    return int(number) if number.is_Integer else None


def _row(maker: Maker, index: Any) -> int | None:
    """Which row of S an index names: from the front, or from the back as a negative number."""
    value = index.meta["val"] if isinstance(index, fx.Node) else index
    if isinstance(value, torch.SymInt) and maker.carries(value):
        difference = value.node.expr - maker.symbol
        return int(difference) if difference.is_number and difference < 0 else None
    return maker.number(index)


@rule(aten.select.int)
def select(maker: Maker, node: fx.Node, modes: Modes, value: Tensor) -> fx.Node:
    source, dim, index = node.args
    assert isinstance(source, fx.Node)
    before = source.meta["val"].shape
    dim = dim % len(before)  # type: ignore[operator]
    if maker.carries(before[dim]):
        if maker.pure(before[dim]) and _row(maker, index) == -1 and maker.takes_last(node):
            own: Modes = (*modes[:dim], NEW, *modes[dim:])
            x = maker.get(source, own)
            if maker.every:  # rows in place of the one sequence
                if dim != 1 or before[0] != 1:
                    raise NotIncremental(f"{node.name}: the last token of several sequences")
                return maker.graph.call_function(aten.squeeze.dim, (x, 0))
            return maker.emit(node, (x, dim, -1))
        if maker.number(index) == 0 and maker.dependent[source]:
            made = maker.first_row(source, (*modes[:dim], None, *modes[dim:]), dim)
            return maker.graph.call_function(aten.squeeze.dim, (made, dim))
        raise NotIncremental(f"{node.name}: one row of the sequence")
    return maker.emit(node, (maker.get(source, (*modes[:dim], None, *modes[dim:])), dim, index))
