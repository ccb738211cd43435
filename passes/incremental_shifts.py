"""Rules of `dspark_compile.passes.incremental` for ops that read the rows of earlier tokens: joins
and pads along the sequence, writes to a part of it, causal convolutions.

Each says which rows of its operands the wanted ones are made of, and hides those in front of the
first token. Rows of a later token are refused where they are asked for: at the value itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from dspark_compile.passes.base import dialect
from dspark_compile.passes.causal import SIZES, Bounds
from dspark_compile.passes.graph import argument, aten
from dspark_compile.passes.incremental_core import (
    ALL,
    LIKE,
    InFront,
    Maker,
    Modes,
    NotIncremental,
    Rows,
    rule,
)
from dspark_compile.passes.incremental_views import unrolled

_ONES = frozenset({aten.ones_like.default, aten.new_ones.default, aten.ones.default})
_NUMBERED = {
    aten.full_like.default: 1, aten.new_full.default: 2, aten.full.default: 1, aten.fill.Scalar: 1,
    aten.fill.Tensor: 1,
}  # fmt: skip
_FILLS = frozenset({*LIKE, aten.full.default, aten.zeros.default, aten.ones.default}) - {
    aten.copy.default
}
# Kernels up to this long are taken apart into products of rows.
_SHORT = 16


def _replaced(modes: Modes, dim: int, mode: Any) -> Modes:
    return (*modes[:dim], mode, *modes[dim + 1 :])


def _filled_with(maker: Maker, node: Any) -> Any:
    """The number that every element of ``node`` is; None: it is not known to be one."""
    while isinstance(node, fx.Node) and node.target in (
        aten.expand.default, aten.clone.default, aten.alias.default, aten._to_copy.default,
    ):  # fmt: skip
        node = node.args[0]
    if not isinstance(node, fx.Node) or node.target not in _FILLS:
        return None
    if node.target not in _NUMBERED:
        return 1 if node.target in _ONES else 0
    number = node.args[_NUMBERED[node.target]]  # type: ignore[index]
    if isinstance(number, fx.Node):
        value = maker.constant(number)
        return None if value is None or value.numel() != 1 else value.item()
    return number if isinstance(number, (int, float)) else None


@rule(*LIKE - {aten.copy.default})
def like(maker: Maker, node: fx.Node, modes: Modes, value: Tensor) -> fx.Node:
    """As large as something else, and filled with one number."""
    number = _filled_with(maker, node)
    sizes = [maker.size(n, modes[d]) for d, n in enumerate(value.shape)]
    kwargs = {"dtype": value.dtype, "device": value.device}
    call = maker.graph.call_function
    if number is not None:
        return call(aten.full.default, (sizes, number), kwargs)
    if node.target is not aten.fill.Tensor:
        raise NotIncremental(f"{node.name}: filled with what is no number")
    base = call(aten.full.default, (sizes, 0), kwargs)
    return call(aten.fill.Tensor, (base, maker.get(node.args[1])))


@rule(aten.copy.default)
def copy(maker: Maker, node: fx.Node, modes: Modes, value: Tensor) -> fx.Node:
    """What is written over all of a tensor, in its dtype."""
    source = node.args[1]
    assert isinstance(source, fx.Node)
    made = maker.operand(source, modes)
    if source.meta["val"].dtype != value.dtype:
        made = maker.graph.call_function(aten._to_copy.default, (made,), {"dtype": value.dtype})
    if source.meta["val"].dim() != value.dim() or _spreads(maker, source, value):
        sizes = [maker.size(n, modes[d]) for d, n in enumerate(value.shape)]
        made = maker.graph.call_function(aten.expand.default, (made, sizes))
    return made


def _spreads(maker: Maker, source: fx.Node, value: Tensor) -> bool:
    return any(
        m == 1 and (maker.carries(n) or n != 1)
        for m, n in zip(source.meta["val"].shape, value.shape, strict=True)
    )


def _hidden(maker: Maker, x: fx.Node, behind: int, mode: Rows, row: int, other: Any) -> fx.Node:
    """``x``, rows ``mode`` of something, with ``other`` for those before ``row``: a number, or a
    node. ``behind`` dimensions follow that of the rows."""
    if mode.offset >= row and not maker.fronted:
        return x
    mask, call = maker.before(mode, row, behind), maker.graph.call_function
    if isinstance(other, fx.Node):
        return call(aten.where.self, (mask, other, x))
    return call(aten.masked_fill.Scalar, (x, mask, other))


@rule(aten.cat.default)
def cat(maker: Maker, node: fx.Node, modes: Modes, value: Tensor) -> fx.Node:
    dim = argument(node, 1, "dim", 0) % value.dim()
    return _joined(maker, node, list(node.args[0]), dim, modes, value)  # type: ignore[arg-type]


@rule(aten.stack.default)
def stack(maker: Maker, node: fx.Node, modes: Modes, value: Tensor) -> fx.Node:
    dim = argument(node, 1, "dim", 0) % value.dim()
    if modes[dim] is not None:
        raise NotIncremental(f"{node.name}: a stack of the first rows of the sequence")
    own = (*modes[:dim], *modes[dim + 1 :])
    parts = [maker.get(x, own) for x in node.args[0]]  # type: ignore[union-attr]
    return maker.graph.call_function(aten.stack.default, (parts, dim))


@rule("cache_extend")
def extend(maker: Maker, node: fx.Node, modes: Modes, value: Tensor) -> fx.Node:
    """A learned prefix of keys or values, with the tokens' behind it."""
    return _joined(maker, node, list(node.args), 2, modes, value)


def _joined(
    maker: Maker, node: fx.Node, parts: list[Any], dim: int, modes: Modes, value: Tensor
) -> fx.Node:
    mode = modes[dim]
    if mode is None:
        made = [maker.get(x, modes) for x in parts]
        return maker.graph.call_function(aten.cat.default, (made, dim))
    sizes = [x.meta["val"].shape[dim] for x in parts]
    at = next((i for i, n in enumerate(sizes) if maker.carries(n)), None)
    more = None if at is None else maker.more(sizes[at])
    if at is None or more is None:
        raise NotIncremental(f"{node.name}: a join of the first rows of the sequence")
    start = sum(int(n) for n in sizes[:at])
    if mode == ALL:
        if at != len(parts) - 1:
            raise NotIncremental(f"{node.name}: it joins something behind the last token")
        if maker.fronted is False and maker.dependent[node]:
            raise InFront(f"{node.name}: it joins something in front of the first token")
        front = [maker.get(x, _replaced(modes, dim, None)) for x in parts[:at]]
        front.append(maker.get(parts[at], modes))
        return maker.graph.call_function(aten.cat.default, (front, dim))
    assert isinstance(mode, Rows)
    if at != len(parts) - 1 and mode.ahead > start + more:
        raise NotIncremental(f"{node.name}: rows behind the last token are read")
    made = maker.get(parts[at], _replaced(modes, dim, mode.back(start)))
    for x, n in zip(reversed(parts[:at]), reversed(sizes[:at]), strict=True):
        end, start = start, start - int(n)
        if n == 0:
            continue
        other: Any = _filled_with(maker, x)
        if other is None and n == 1 and x.target is not aten.slice.Tensor:
            other = maker.get(x, _replaced(modes, dim, None))
        elif other is None:
            other = maker.get(x, _replaced(modes, dim, mode.back(start)))
        made = _hidden(maker, made, value.dim() - 1 - dim, mode, end, other)
    return made


@rule(aten.constant_pad_nd.default)
def pad(maker: Maker, node: fx.Node, modes: Modes, value: Tensor) -> fx.Node:
    """Rows in front of the sequence, rows of it cut off at its end."""
    x, pads, fill = [*node.args, 0][:3]
    assert isinstance(x, fx.Node) and isinstance(pads, (list, tuple))
    rank, shape = value.dim(), x.meta["val"].shape
    numbers = [maker.number(n) for n in pads]
    if None in numbers:
        raise NotIncremental(f"{node.name}: it pads by what depends on the length")
    kept: list[Any] = list(numbers)
    own: list[Any] = list(modes)
    hidden = []
    for i in range(len(pads) // 2):
        dim = rank - 1 - i
        left, right = int(numbers[2 * i] or 0), int(numbers[2 * i + 1] or 0)
        mode = modes[dim]
        if mode is None or not (left or right):
            continue
        more = maker.more(shape[dim])
        if more is None:
            raise NotIncremental(f"{node.name}: it pads the first rows of the sequence")
        if mode == ALL:
            if right > 0:
                raise NotIncremental(f"{node.name}: it pads behind the last token")
            if left > 0 and maker.fronted is False and maker.dependent[node]:
                raise InFront(f"{node.name}: it pads in front of the first token")
            continue
        assert isinstance(mode, Rows)
        if right > 0 and mode.ahead > left + more:
            raise NotIncremental(f"{node.name}: rows behind the last token are read")
        kept[2 * i] = kept[2 * i + 1] = 0
        own[dim] = mode.back(left)
        if left > 0:
            hidden.append((dim, mode, left))
    made = maker.get(x, tuple(own))
    if any(kept):
        made = maker.graph.call_function(aten.constant_pad_nd.default, (made, kept, fill))
    for dim, mode, left in hidden:
        made = _hidden(maker, made, rank - 1 - dim, mode, left, fill)
    return made


@rule(aten.roll.default)
def roll(maker: Maker, node: fx.Node, modes: Modes, value: Tensor) -> fx.Node:
    x, shifts, dims = [*node.args, []][:3]
    rank = value.dim()
    if not dims or any(modes[d % rank] is not None for d in dims):  # type: ignore[operator, union-attr]
        raise NotIncremental(f"{node.name}: the last row of the sequence comes first")
    return maker.emit(node, (maker.get(x, modes), shifts, dims))


@rule(aten.mul.Tensor, aten.where.self, aten.masked_fill.Scalar)
def masked(maker: Maker, node: fx.Node, modes: Modes, value: Tensor) -> fx.Node:
    """Pointwise, and of what is rolled along the sequence a choice may leave out the rows that came
    round: ``where(at == 0, 0, x.roll(1, 1))``."""
    args: list[Any] = list(node.args)
    for number, x in enumerate(args):
        given = x.meta["val"] if isinstance(x, fx.Node) else None
        if not isinstance(given, Tensor) or given.dim() != value.dim():
            continue
        for dim, mode in enumerate(modes):
            base, shift = unrolled(maker, x, dim, _SHORT)  # type: ignore[arg-type]
            if not shift or not isinstance(mode, Rows) or not maker.pure(value.shape[dim]):
                continue
            if _leaves_out(maker, node, number, dim, shift):
                args[number] = maker.get(base, _replaced(modes, dim, mode.back(shift)))
    if args == list(node.args):
        return maker._pointwise(node, modes, value)
    made = [
        maker.operand(x, modes) if isinstance(x, fx.Node) and x is node.args[i] else x
        for i, x in enumerate(args)
    ]
    return maker.emit(node, made)


def _leaves_out(maker: Maker, node: fx.Node, number: int, dim: int, rows: int) -> bool:
    """Whether operand ``number`` counts for nothing in the first ``rows`` rows, at two lengths."""
    where = node.target is aten.where.self
    choice: Any = node.args[0 if where else 1 - number]
    if not isinstance(choice, fx.Node) or (where and not number) or number > 1 + int(where):
        return False
    for size in SIZES:
        known = Bounds(maker.symbol, size, maker.values, maker.tokens).concrete(choice)
        if not isinstance(known, Tensor):
            return False
        known = known.expand(*([1] * (node.meta["val"].dim() - known.dim())), *known.shape)
        if known.shape[dim] == size:
            known = known.narrow(dim, 0, rows)
        taken = known == 0 if node.target is aten.masked_fill.Scalar else known != 0
        if bool((~taken if where and number == 2 else taken).any()):
            return False
    return True


@rule(aten.slice_scatter.default)
def slice_scatter(maker: Maker, node: fx.Node, modes: Modes, value: Tensor) -> fx.Node:
    """``y[:, 1:] = x``."""
    base, source = node.args[:2]
    assert isinstance(base, fx.Node) and isinstance(source, fx.Node)
    dim = argument(node, 2, "dim", 0) % value.dim()
    start, step = argument(node, 3, "start") or 0, argument(node, 5, "step", 1)
    mode = modes[dim]
    if mode is None and not maker.carries(value.shape[dim]):
        both = (maker.get(base, modes), maker.get(source, modes))
        return maker.emit(node, (*both, *node.args[2:]))
    size = source.meta["val"].shape[dim]
    whole = maker.more(value.shape[dim])
    start = maker.number(start)
    if not isinstance(mode, Rows) or whole is None or step != 1 or start is None or start < 0:
        raise NotIncremental(f"{node.name}: a part of the sequence is written to")
    if not maker.carries(size):
        return _overwritten(maker, node, modes, dim, start, int(size), source)
    more = maker.more(size)
    if more is None or (more + start < whole and mode.ahead > more + start):
        raise NotIncremental(f"{node.name}: what is written ends before the last token")
    made = maker.get(source, _replaced(modes, dim, mode.back(start)))
    if not start:
        return made
    other = _filled_with(maker, base)
    if other is None:
        other = maker.get(base, modes)
    return _hidden(maker, made, value.dim() - 1 - dim, mode, start, other)


@rule(aten.select_scatter.default)
def select_scatter(maker: Maker, node: fx.Node, modes: Modes, value: Tensor) -> fx.Node:
    """``y[:, 0] = x``."""
    base, source = node.args[:2]
    assert isinstance(source, fx.Node)
    dim = argument(node, 2, "dim") % value.dim()
    at = argument(node, 3, "index")
    if modes[dim] is None:
        own = (*modes[:dim], *modes[dim + 1 :])
        both = (maker.get(base, modes), maker.get(source, own))
        return maker.emit(node, (*both, *node.args[2:]))
    row = maker.number(at)
    if not isinstance(modes[dim], Rows) or row is None or row < 0:
        raise NotIncremental(f"{node.name}: one row of the sequence is written to")
    return _overwritten(maker, node, modes, dim, row, 1, source, lost=True)


def _overwritten(
    maker: Maker, node: fx.Node, modes: Modes, dim: int, start: int, count: int, source: fx.Node,
    lost: bool = False,
) -> fx.Node:  # fmt: skip
    """The first operand of ``node`` with rows ``start`` … of ``source`` in place of its own, which
    has no such dimension where it is ``lost``."""
    mode, rank = modes[dim], node.meta["val"].dim()
    assert isinstance(mode, Rows)
    base, call = node.args[0], maker.graph.call_function
    assert isinstance(base, fx.Node)
    base, shift = unrolled(maker, base, dim, count if start == 0 else 0)
    rest = maker.get(base, _replaced(modes, dim, mode.back(shift)))
    other: Any = _filled_with(maker, source)
    if other is None and count == 1:
        if lost:
            other = maker.get(source, (*modes[:dim], *modes[dim + 1 :]))
            other = call(aten.unsqueeze.default, (other, dim))
        else:
            other = maker.get(source, _replaced(modes, dim, None))
    elif other is None:
        other = maker.get(source, _replaced(modes, dim, mode.back(start)))
    result = _hidden(maker, rest, rank - 1 - dim, mode, start + count, other)
    if start:
        result = _hidden(maker, result, rank - 1 - dim, mode, start, rest)
    return result


@rule(aten.unfold.default)
def unfold(maker: Maker, node: fx.Node, modes: Modes, value: Tensor) -> fx.Node:
    """``x.unfold(1, k, 1)``: each row with those behind it."""
    x, dim, size, step = node.args
    assert isinstance(x, fx.Node) and isinstance(size, int)
    dim = dim % (value.dim() - 1)  # type: ignore[operator]
    mode, own = modes[dim], modes[:-1]
    if mode is None and not maker.carries(x.meta["val"].shape[dim]):
        return maker.emit(node, (maker.get(x, own), dim, size, step))
    if not isinstance(mode, Rows) or step != 1 or size > _SHORT:
        raise NotIncremental(f"{node.name}: windows of the sequence")
    call = maker.graph.call_function
    parts = [maker.get(x, _replaced(own, dim, mode.back(-i))) for i in range(size)]
    parts = [call(aten.unsqueeze.default, (part, -1)) for part in parts]
    return call(aten.cat.default, (parts, value.dim() - 1))


@rule(aten.convolution.default)
def convolution(maker: Maker, node: fx.Node, modes: Modes, value: Tensor) -> fx.Node:
    x, weight, bias, stride, padding, dilation, transposed, _, groups = node.args
    assert isinstance(x, fx.Node) and isinstance(weight, fx.Node)
    shape = x.meta["val"].shape
    along = [d for d in range(2, value.dim()) if maker.carries(shape[d])]
    if any(maker.dependent[w] for w in (weight, bias) if isinstance(w, fx.Node)):
        raise NotIncremental(f"{node.name}: its weights depend on tokens")
    if maker.carries(shape[1]) or transposed or len(along) > 1:
        raise NotIncremental(f"{node.name}: a convolution that is not along the sequence alone")
    if not along:
        return maker.emit(
            node, (maker.get(x, modes), *map(maker.get, (weight, bias)), *node.args[3:])
        )
    (dim,) = along
    mode, more = modes[dim], maker.more(shape[dim])
    by, front, apart = (int(maker.number(t[dim - 2]) or 0) for t in (stride, padding, dilation))  # type: ignore[index, union-attr]
    if not isinstance(mode, Rows) or more is None or by != 1:
        raise NotIncremental(f"{node.name}: a convolution whose rows are not the tokens'")
    count = int(weight.meta["val"].shape[dim])
    reach = apart * (count - 1)
    # Row i is made of rows i - front … i - front + reach.
    first = mode.back(front)
    if front and first.ahead + reach > more:
        raise NotIncremental(f"{node.name}: a convolution that reads rows of later tokens")

    def rows(of: Rows) -> fx.Node:
        made = maker.get(x, _replaced(modes, dim, of))
        if front and of.offset < 0:  # nothing lies in front of the first row
            hide = Rows(of.offset, of.extra)
            made = _hidden(maker, made, value.dim() - 1 - dim, hide, 0, 0)
        return made

    flat = value.dim() == 3 and all(m is None for m in modes[:2])
    if flat and groups == shape[1] and count <= _SHORT:
        return _by_channel(maker, node, [rows(first.back(-apart * i)) for i in range(count)])
    if flat and groups == 1 and count <= _SHORT:
        return _as_linear(maker, node, [rows(first.back(-apart * i)) for i in range(count)])
    made = rows(first.back(0, reach))
    without = [0 if d == dim - 2 else n for d, n in enumerate(padding)]  # type: ignore[arg-type]
    args = (made, maker.get(weight), maker.get(bias), stride, without, *node.args[5:])
    return maker.emit(node, args)


def _by_channel(maker: Maker, node: fx.Node, rows: Sequence[fx.Node]) -> fx.Node:
    """A convolution of each channel alone: a sum of rows times numbers, rounded once."""
    call, dtype = maker.graph.call_function, node.meta["val"].dtype
    weight, bias = maker.get(node.args[1]), maker.get(node.args[2])
    small = dtype in (torch.bfloat16, torch.float16)
    wide = {"dtype": torch.float32}

    def widened(x: fx.Node) -> fx.Node:
        return call(aten._to_copy.default, (x,), wide) if small else x

    rest, _, count = (int(n) for n in node.args[1].meta["val"].shape)  # type: ignore[union-attr]
    groups = int(node.args[8])  # type: ignore[call-overload]
    times = rest // groups  # results of each channel
    size = [groups, times, count] if times > 1 else [groups, count]
    kernel = call(aten.reshape.default, (widened(weight), size))
    total = None if bias is None else call(aten.reshape.default, (widened(bias), [*size[:-1], 1]))
    for i, row in enumerate(rows):
        column = call(aten.slice.Tensor, (kernel, len(size) - 1, i, i + 1))
        row = call(aten.unsqueeze.default, (row, 2)) if times > 1 else row
        part = call(aten.mul.Tensor, (widened(row), column))
        total = part if total is None else call(aten.add.Tensor, (part, total))
    assert total is not None
    total = call(aten._to_copy.default, (total,), {"dtype": dtype}) if small else total
    if times == 1:
        return total
    batch, length = (call(aten.sym_size.int, (total, d)) for d in (0, 3))
    return call(aten.reshape.default, (total, [batch, rest, length]))


def _as_linear(maker: Maker, node: fx.Node, rows: Sequence[fx.Node]) -> fx.Node:
    """A convolution over all channels: a linear layer of the rows side by side, since its weight
    ``[out, channels, k]`` lies as that of one ``[out, channels k]``."""
    call = maker.graph.call_function
    weight, bias = maker.get(node.args[1]), maker.get(node.args[2])
    rest, channels, count = (int(n) for n in node.args[1].meta["val"].shape)  # type: ignore[union-attr]
    parts = [call(aten.unsqueeze.default, (row, -1)) for row in rows]  # [B, C, M, 1]
    window = call(aten.permute.default, (call(aten.cat.default, (parts, 3)), [0, 2, 1, 3]))
    batch, length = (call(aten.sym_size.int, (window, d)) for d in (0, 1))
    wide = call(aten.reshape.default, (window, [batch, length, channels * count]))
    flat = call(aten.reshape.default, (weight, [rest, channels * count]))
    made = call(dialect("linear"), (wide, flat, bias))
    return call(aten.permute.default, (made, [0, 2, 1]))
